"""Plots of curvature: Hessians, their spectra, and the loss over a plane of weights."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Axes, Nested
from keras_gradtools.drawing.matrices import imshow_zero_center
from keras_gradtools.drawing.pyplot import current_axes, epochs_or_measurements, numbers, pyplot_or_error
from keras_gradtools.drawing.styles import legend_above_curves, series_style

_LEVELS = 12


def plot_hessian(hessian: Nested, ax: Axes | None = None, blocks: Any = None, **kwargs: Any) -> Axes:
    """Plots a Hessian as an image with zero at the center of the color map, and marks the blocks of its variables.

    Args:
        hessian: Real numbers of shape `(n, n)`, as returned by `operator.dense()`, or nested blocks, as returned by
            `operator.blocks()` and `kg.hessian`.
        ax: The matplotlib Axes to draw on. By default, the current one.
        blocks: The curvature operator that the Hessian comes from, whose variables label the blocks, or a dict from
            names to slices. By default, nested blocks are marked with their names or numbers, and a matrix is not.
        **kwargs: The options `limit`, `colorbar` and `cmap` of `imshow_zero_center`.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If `hessian` is not square, or the blocks do not match its size.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.plot_hessian(np.eye(3), blocks={"kernel": slice(0, 2), "bias": slice(2, 3)})
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['kernel', 'bias']
    """
    joined, found = _joined(hessian)
    matrix = numbers(joined, "plot_hessian", "(n, n)", (2,))
    n = len(matrix)
    blocks = found if blocks is None else _slices_by_name(blocks)
    ends = [place.stop for place in blocks.values()]
    if matrix.shape != (n, n) or (blocks and max(ends) != n):
        raise ValueError(
            f"plot_hessian expects a square matrix{f' of size {max(ends)}, to match the blocks' if blocks else ''}. "
            f"Received: {validation.describe(hessian)}."
        )
    ax = imshow_zero_center(matrix, ax, **kwargs)
    if blocks:
        for end in ends[:-1]:
            ax.axhline(end - 0.5, color="0.4", linewidth=0.6)
            ax.axvline(end - 0.5, color="0.4", linewidth=0.6)
        middles = [(place.start + place.stop - 1) / 2 for place in blocks.values()]
        ax.set_yticks(middles, list(blocks))
        ax.set_xticks(middles, list(blocks), rotation=40, ha="right", rotation_mode="anchor")
    return ax


def _joined(hessian):
    """A matrix from nested blocks, and the slices of its blocks by name. Anything else is returned without slices."""
    rows = nesting.entries(hessian) if nesting.is_nested(hessian) else []
    if not rows or not all(nesting.is_nested(row) for row in rows):
        return hessian, {}
    leaves = [leaf for leaf in nesting.flatten(hessian) if leaf is not None]
    count = math.isqrt(len(leaves))
    if not any(len(getattr(leaf, "shape", ())) for leaf in leaves):
        return hessian, {}
    arrays = [validation.as_array(leaf, "plot_hessian expects arrays or tensors as blocks") for leaf in leaves]
    sizes = [math.isqrt(array.size) for array in arrays[:: count + 1]]
    grid = [arrays[i * count : (i + 1) * count] for i in range(count)]
    fits = len(leaves) == count**2 and all(
        block.size == m * n for row, m in zip(grid, sizes, strict=True) for block, n in zip(row, sizes, strict=True)
    )
    if not fits:
        raise ValueError(
            "plot_hessian expects a matrix of shape (n, n), or nested blocks of a Hessian, where the block of the i-th "
            f"and the j-th variable has the shape (*in_i, *in_j). Received: blocks of the shapes "
            f"{', '.join(str(array.shape) for array in arrays[:5])}{', ...' if len(arrays) > 5 else ''}. Pass what "
            "`operator.dense()`, `operator.blocks()` or `kg.hessian` returns."
        )
    matrix = np.block(
        [[b.reshape(m, n) for b, n in zip(row, sizes, strict=True)] for row, m in zip(grid, sizes, strict=True)]
    )
    pairs = zip(nesting.paths(hessian), nesting.flatten(hessian), strict=True)
    first_row = [path for path, leaf in pairs if leaf is not None][:count]
    names = ["/".join(map(str, path[len(first_row[0]) // 2 :])) for path in first_row]
    ends = np.cumsum(sizes)
    return matrix, {name: slice(end - size, end) for name, end, size in zip(names, ends.tolist(), sizes, strict=True)}


def _slices_by_name(blocks):
    if isinstance(blocks, dict):
        return dict(blocks)
    if not hasattr(blocks, "slices") or not hasattr(blocks, "variables"):
        raise validation.refused("plot_hessian", "a curvature operator or a dict of slices by name", "blocks", blocks)
    # The name of the model is the same in all labels.
    names = [v.path.split("/", 1)[-1] for v in blocks.variables]
    return dict(zip(names, blocks.slices, strict=True))


def plot_spectral_density(density: Any, ax: Axes | None = None, floor: float = 1e-6) -> Axes:
    r"""Plots a density of eigenvalues on a logarithmic scale, with a band of plus and minus two standard errors.

    Args:
        density: The result of the method `spectral_density` of a curvature operator.
        ax: The matplotlib Axes to draw on. By default, the current one.
        floor: The smallest density shown, as a fraction of the largest.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If `density` is not such a result, or `floor` is not between 0 and 1.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> grid = np.linspace(-1.0, 1.0, 5)
    >>> flat = kg.curvature.SpectralDensity(grid, np.full(5, 0.5), np.zeros(5), grid[None], np.ones((1, 5)), 0.1)
    >>> kg.plots.plot_spectral_density(flat).get_xlabel()
    'eigenvalue'
    """
    if not all(hasattr(density, name) for name in ("grid", "density", "standard_error")):
        raise ValueError(
            "plot_spectral_density expects the result of `spectral_density` of a curvature operator. Received: "
            f"{validation.describe(density)}."
        )
    validation.require_number("plot_spectral_density", "floor", floor, above=0, below=1)
    ax = current_axes(ax)
    largest = density.density.max()
    bottom = floor * largest
    lower, upper = (np.maximum(density.density + s * density.standard_error, bottom) for s in (-2, 2))
    color = series_style(0)["color"]
    ax.fill_between(density.grid, lower, upper, color=color, alpha=0.3, linewidth=0, label="two standard errors")
    ax.semilogy(density.grid, np.maximum(density.density, bottom), color=color, linewidth=1.2, label="density")
    ax.axvline(0.0, color="0.5", linewidth=0.8, linestyle=":")
    ax.set(xlabel="eigenvalue", ylabel="density, per unit of eigenvalue", ylim=(bottom, 3 * upper.max()))
    ax.set_xlim(density.grid[0], density.grid[-1])
    legend_above_curves(ax, 2)
    return ax


def plot_eigenvalue_history(history: Any, ax: Axes | None = None, keys: Sequence[str] | None = None) -> Axes:
    """Plots eigenvalues over training.

    If the values vary widely, the scale is linear around zero and logarithmic beyond.

    Args:
        history: The result of `fit`, or its dict `history.history`. Every entry with "eigenvalue" in its name is drawn.
            Alternatively, numbers of shape `(steps,)` or `(steps, k)`.
        ax: The matplotlib Axes to draw on. By default, the current one.
        keys: The names of the entries of `history` to draw instead, in a list.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.plot_eigenvalue_history({"loss": [1.0, 0.5], "hessian_max_eigenvalue": [10.0, 40.0]})
    >>> [line.get_label() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_label()[0] != "_"]
    ['hessian_max_eigenvalue']
    """
    curves = _curves(history, keys)
    ax = current_axes(ax)
    places = {name: epochs_or_measurements(history, len(values)) for name, values in curves.items()}
    for number, (name, values) in enumerate(curves.items()):
        # A quantity that was not measured in every epoch has fewer values, or NaN.
        ax.plot(places[name][0], values, label=name, markersize=4, **series_style(number))
    finite = np.abs(np.concatenate([v[np.isfinite(v)] for v in curves.values()]))
    positive = finite[finite > 0]
    if positive.size and positive.max() > 50 * np.median(positive):
        ax.set_yscale("symlog", linthresh=float(np.median(positive)))
    ax.axhline(0.0, color="0.5", linewidth=0.8, linestyle=":")
    labels = {label for _, label in places.values()}
    ax.set(xlabel=labels.pop() if len(labels) == 1 else "measurement", ylabel="eigenvalue")
    ax.xaxis.set_major_locator(pyplot_or_error().MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    legend_above_curves(ax)
    return ax


def _curves(history, keys):
    history = getattr(history, "history", history)
    if keys is not None and not (isinstance(keys, (list, tuple)) and all(isinstance(key, str) for key in keys)):
        raise validation.refused("plot_eigenvalue_history", "a list of names of entries", "keys", keys)
    if isinstance(history, dict):
        names = [name for name in history if "eigenvalue" in name] if keys is None else list(keys)
        missing = [name for name in names if name not in history]
        if missing or not names:
            raise ValueError(
                "plot_eigenvalue_history expects a history with eigenvalues in it. Received: the entries "
                f"{sorted(history)}{f', without {missing}' if missing else ''}. Pass `fit` a callback that logs them, "
                "or name other entries in `keys`."
            )
        return {name: np.asarray(history[name], "float64") for name in names}
    values = numbers(history, "plot_eigenvalue_history", "(steps,) or (steps, k)", (1, 2))
    columns = values[:, None] if values.ndim == 1 else values
    return {f"eigenvalue {i + 1}": column for i, column in enumerate(columns.T)}


def plot_loss_surface(surface: Any, ax: Axes | None = None, levels: int = _LEVELS) -> Axes:
    """Plots the loss over a plane of weights, as filled contours around the current weights.

    Args:
        surface: The result of the method `loss_surface` of a curvature operator.
        ax: The matplotlib Axes to draw on. By default, the current one.
        levels: Number of contour intervals. Their bounds are quantiles, so that each covers an equal part of the plane.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If `surface` is not such a result, or has no finite loss.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> line = np.linspace(-1.0, 1.0, 5)
    >>> surface = kg.curvature.LossSurface(line, line, line[:, None] ** 2 + line**2, np.array([2.0, 2.0]))
    >>> kg.plots.plot_loss_surface(surface).get_xlabel()
    'along direction 1, curvature 2'
    """
    if not all(hasattr(surface, name) for name in ("first", "second", "loss", "curvatures")):
        raise ValueError(
            "plot_loss_surface expects the result of `loss_surface` of a curvature operator. Received: "
            f"{validation.describe(surface)}."
        )
    validation.require_count("plot_loss_surface", "levels", levels)
    ax = current_axes(ax)
    loss = np.ma.masked_invalid(surface.loss)
    if not loss.count():
        raise ValueError("plot_loss_surface expects finite losses. Received: a surface without any.")
    edges = np.unique(np.quantile(loss.compressed(), np.linspace(0.0, 1.0, levels + 1)))
    # Transposed, because the first direction is along the rows of `loss` and goes to the right in the plot.
    if len(edges) > 1:
        picture = ax.contourf(surface.first, surface.second, loss.T, levels=edges, cmap="viridis")
        ax.contour(surface.first, surface.second, loss.T, levels=edges, colors="white", linewidths=0.5)
        bar = ax.figure.colorbar(picture, ax=ax, label="loss")
        bar.ax.yaxis.set_major_formatter("{x:.3g}")
    ax.plot(0.0, 0.0, "+", color="white", markersize=10, markeredgewidth=2)
    for axis, number, curvature in zip((ax.xaxis, ax.yaxis), (1, 2), surface.curvatures, strict=True):
        axis.set_label_text(f"along direction {number}, curvature {curvature:.3g}")
    return ax
