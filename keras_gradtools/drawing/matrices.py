"""Plots of matrices and Jacobians, with zero at the center of the color map."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import ArrayLike, Axes
from keras_gradtools.drawing.pyplot import current_axes, numbers, panels, pyplot_or_error


def imshow_zero_center(
    image: ArrayLike, ax: Axes | None = None, limit: float | None = None, colorbar: bool = True, cmap: str = "RdBu_r"
) -> Axes:
    r"""Plots a matrix as an image with zero at the center of the color map.

    The color map covers $[-c, c]$ with $c = \max \lvert a_{ij} \rvert$.

    Args:
        image: Real numbers of shape `(height, width)`: a tensor, an array, or nested lists. NaN is drawn in gray.
        ax: The matplotlib Axes to draw on. By default, the current one.
        limit: $c$, to draw several matrices on the same scale. By default, the largest finite absolute value.
        colorbar: Whether to draw a color bar beside the image.
        cmap: The matplotlib color map. Use one with a neutral center.

    Returns:
        The matplotlib Axes. The image is the last one in `ax.images`.

    Raises:
        ValueError: If `image` is not a matrix of real numbers, or an option is not valid.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.imshow_zero_center([[0.0, 1.0], [-3.0, 2.0]])
    >>> [float(c) for c in ax.images[-1].get_clim()]
    [-3.0, 3.0]
    """
    image = numbers(image, "imshow_zero_center", "(height, width)", (2,))
    limit = validation.require_number("imshow_zero_center", "limit", limit, above=0, may_be_none=True)
    if limit is None:
        magnitudes = np.abs(image[np.isfinite(image)])
        limit = magnitudes.max(initial=0.0) or 1.0
    validation.require_flag("imshow_zero_center", "colorbar", colorbar)
    ax = current_axes(ax)
    colors = pyplot_or_error().get_cmap(cmap).with_extremes(bad="0.8")
    picture = ax.imshow(image, vmin=-limit, vmax=limit, cmap=colors, interpolation="nearest")
    if colorbar:
        ax.figure.colorbar(picture, ax=ax)
    return ax


def plot_as_patches(
    jacobian: ArrayLike, ax: Axes | None = None, patch_axes: Sequence[int] | None = None, pad: int = 1, **kwargs: Any
) -> Axes:
    """Plots a Jacobian as a grid of patches, each a matrix, separated by gray lines.

    Two axes of the Jacobian form the patches, and the others form the rows and columns of the grid:

    - For a full Jacobian, `(batch, out, batch, in)`, there is one patch for each output and input, with the examples
      along both of its axes. If the examples are independent, only its diagonal is nonzero.
    - For a batch Jacobian, `(batch, out, in)`, there is one patch of shape `(out, in)` for each example, side by side.
    - For a batch Jacobian of images, `(batch, out, height, width)`, with `patch_axes=(2, 3)`, there is one row for each
      example, with a sensitivity map for each output.

    Args:
        jacobian: Real numbers of rank 3 or 4: a tensor or an array.
        ax: The matplotlib Axes to draw on. By default, the current one.
        patch_axes: The vertical and the horizontal axis of a patch. By default, `(0, 2)` for rank 4 and `(1, 2)` for
            rank 3.
        pad: Number of pixels between two patches.
        **kwargs: The options `limit`, `colorbar` and `cmap` of `imshow_zero_center`.

    Returns:
        The matplotlib Axes, with a tick at the center of each row and column of patches, numbered from 0.

    Raises:
        ValueError: If the rank is not 3 or 4, an axis is empty, the numbers are complex, `patch_axes` are not valid, or
            `pad` is negative.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.plot_as_patches(np.ones((5, 2, 5, 3)))  # 2 x 3 patches of 5 x 5
    >>> ax.images[-1].get_array().shape
    (11, 17)

    Source: the plots in TensorFlow's guide "Advanced automatic differentiation".
    """
    jacobian = numbers(jacobian, "plot_as_patches", "(batch, out, in) or (batch, out, batch, in)", (3, 4))
    grid = _as_grid(jacobian, patch_axes)
    pad = validation.require_count("plot_as_patches", "pad", pad, 0)
    rows, columns, height, width = grid.shape
    # The separators after the last row and column are cut off below.
    image = np.full((rows, columns, height + pad, width + pad), np.nan)
    image[:, :, :height, :width] = grid
    image = image.swapaxes(1, 2).reshape(rows * (height + pad), columns * (width + pad))
    ax = imshow_zero_center(image[: image.shape[0] - pad, : image.shape[1] - pad], ax, **kwargs)
    ax.set_xticks(np.arange(columns) * (width + pad) + (width - 1) / 2, [str(i) for i in range(columns)])
    ax.set_yticks(np.arange(rows) * (height + pad) + (height - 1) / 2, [str(i) for i in range(rows)])
    return ax


def plot_jacobians(
    jacobians: Mapping[str, ArrayLike],
    ax: Sequence[Axes] | None = None,
    patch_axes: Sequence[int] | None = None,
    pad: int = 1,
    limit: float | None = None,
    cmap: str = "RdBu_r",
) -> np.ndarray:
    """Plots several Jacobians side by side on the same color scale, each as in `plot_as_patches`.

    For a full Jacobian, `(batch, out, batch, in)`, each patch has the shape `(batch, batch)`. It is diagonal if the
    examples are independent. If a layer mixes them, such as BatchNormalization in training mode, it is not diagonal,
    and a batch Jacobian has no clear meaning.

    Args:
        jacobians: A dict from titles to Jacobians.
        ax: As many matplotlib Axes as there are Jacobians, in a list. By default, those of a new figure.
        patch_axes: As in `plot_as_patches`.
        pad: As in `plot_as_patches`.
        limit: As in `imshow_zero_center`. By default, the largest finite absolute value of all Jacobians.
        cmap: As in `imshow_zero_center`.

    Returns:
        An array of the matplotlib Axes, one for each Jacobian. The color bar has Axes of its own.

    Raises:
        ValueError: If `jacobians` is empty or not a dict, and as in `plot_as_patches`.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> j = np.einsum("bc,oi->boci", np.eye(4), np.ones((2, 3)))
    >>> axes = kg.plots.plot_jacobians({"independent": j, "mixed": j + 0.1})
    >>> [ax.get_title() for ax in axes]
    ['independent', 'mixed']
    """
    if not isinstance(jacobians, dict) or not jacobians:
        raise ValueError(
            "plot_jacobians expects a dict from titles to Jacobians. Received: "
            f"{'an empty dict' if isinstance(jacobians, dict) else validation.describe(jacobians)}."
        )
    shape = "(batch, out, in) or (batch, out, batch, in)"
    arrays = {title: numbers(j, "plot_jacobians", shape, (3, 4)) for title, j in jacobians.items()}
    if limit is None:
        limit = max(np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in arrays.values()) or 1.0
    axes = panels(ax, len(arrays), "plot_jacobians", (5 * len(arrays) + 1, 4.8))
    for (title, array), panel in zip(arrays.items(), axes, strict=True):
        plot_as_patches(array, panel, patch_axes, pad, limit=limit, cmap=cmap, colorbar=False)
        panel.set_title(title, wrap=True)
    axes[-1].figure.colorbar(axes[-1].images[-1], ax=list(axes), label="derivative")
    return axes


def _as_grid(jacobian, patch_axes):
    """The Jacobian with the axes (rows of patches, columns of patches, height of a patch, width of a patch)."""
    rank = jacobian.ndim
    if patch_axes is None:
        patch_axes = (0, 2) if rank == 4 else (1, 2)
    axes = tuple(patch_axes) if isinstance(patch_axes, (tuple, list)) else ()
    if len(set(axes)) != 2 or not all(isinstance(a, int) and 0 <= a < rank for a in axes):
        raise ValueError(
            f"plot_as_patches expects two different axes from 0 to {rank - 1} as `patch_axes`, for a Jacobian of "
            f"shape {jacobian.shape}. Received: patch_axes={validation.shown(patch_axes)}."
        )
    others = [a for a in range(rank) if a not in axes]
    grid = jacobian.transpose(*others, *axes)
    return grid if rank == 4 else grid[None]
