"""Pictures of matrices and Jacobians, with zero in the middle of the colours."""

import numpy as np

from keras_gradtools import validation
from keras_gradtools.plots.drawing import numbers, pyplot_or_error


def imshow_zero_center(image, ax=None, limit=None, colorbar=True, cmap="RdBu_r"):
    r"""Shows a matrix with zero in the middle of the colours, $[-c, c]$ with $c = \max \lvert a_{ij} \rvert$.

    Args:
        image: real numbers of shape `(height, width)`: a tensor, an array, or nested lists. NaN is left grey.
        ax: the matplotlib Axes to draw on; the current one by default.
        limit: $c$, to show several matrices on one scale; the largest finite absolute value by default.
        colorbar: whether to put a colour bar beside the picture.
        cmap: the matplotlib colour map, one that has a neutral middle.

    Returns:
        The matplotlib Axes; the picture itself is its last `ax.images`.

    Raises:
        ValueError: if `image` is not a matrix of real numbers, or `limit` is not a positive number.
        ImportError: without matplotlib.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.imshow_zero_center([[0.0, 1.0], [-3.0, 2.0]])
    >>> [float(c) for c in ax.images[-1].get_clim()]
    [-3.0, 3.0]
    """
    image = numbers(image, "imshow_zero_center", "(height, width)", (2,))
    if limit is None:
        magnitudes = np.abs(image[np.isfinite(image)])
        limit = magnitudes.max(initial=0.0) or 1.0
    validation.require_flag("imshow_zero_center", "colorbar", colorbar)
    if not (validation.is_number(limit) and 0 < limit < np.inf):
        raise ValueError(
            "imshow_zero_center expects a positive number as `limit`, or None for the largest value of the image. "
            f"Received: limit={validation.shown(limit)}."
        )
    pyplot = pyplot_or_error()
    ax = pyplot.gca() if ax is None else ax
    colors = pyplot.get_cmap(cmap).with_extremes(bad="0.8")
    picture = ax.imshow(image, vmin=-limit, vmax=limit, cmap=colors, interpolation="nearest")
    if colorbar:
        ax.figure.colorbar(picture, ax=ax)
    return ax


def plot_as_patches(jacobian, ax=None, patch_axes=None, pad=1, **kwargs):
    """Shows a Jacobian as a grid of patches, each a matrix, set apart by grey lines.

    Two axes of the Jacobian make the patches, the others the rows and columns of the grid:

    - of a full Jacobian, `(batch, out, batch, in)`, one patch for each output and input, with the examples
      along both of its sides: where examples are independent, only its diagonal is not zero;
    - of a batch Jacobian, `(batch, out, in)`, one patch of shape `(out, in)` for each example, side by side;
    - of the batch Jacobian of images, `(batch, out, height, width)`, with `patch_axes=(2, 3)`, one row for
      each example with a sensitivity map for each output.

    Args:
        jacobian: real numbers of rank 3 or 4: a tensor or an array.
        ax: the matplotlib Axes to draw on; the current one by default.
        patch_axes: the two axes that make a patch, downwards and across; `(0, 2)` by default for rank 4 and
            `(1, 2)` for rank 3.
        pad: how many pixels set two patches apart.
        **kwargs: the options of `imshow_zero_center`: `limit`, `colorbar`, `cmap`.

    Returns:
        The matplotlib Axes, with a tick at the middle of each patch, numbered from 0.

    Raises:
        ValueError: for another rank, an empty axis, complex numbers, axes that do not exist, or a negative
            `pad`.
        ImportError: without matplotlib.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.plot_as_patches(np.ones((5, 2, 5, 3)))  # 2 x 3 patches of 5 x 5
    >>> ax.images[-1].get_array().shape
    (11, 17)

    Source: the pictures of TensorFlow's guide "Advanced automatic differentiation".
    """
    jacobian = numbers(jacobian, "plot_as_patches", "(batch, out, in) or (batch, out, batch, in)", (3, 4))
    grid = _as_grid(jacobian, patch_axes)
    if not validation.is_count(pad, 0):
        raise ValueError(f"plot_as_patches expects 0 or more pixels as `pad`. Received: pad={validation.shown(pad)}.")
    rows, columns, height, width = grid.shape
    # The last line and column of separators are cut off: they would separate nothing.
    image = np.full((rows, columns, height + pad, width + pad), np.nan)
    image[:, :, :height, :width] = grid
    image = image.swapaxes(1, 2).reshape(rows * (height + pad), columns * (width + pad))
    ax = imshow_zero_center(image[: image.shape[0] - pad, : image.shape[1] - pad], ax, **kwargs)
    ax.set_xticks(np.arange(columns) * (width + pad) + (width - 1) / 2, range(columns))
    ax.set_yticks(np.arange(rows) * (height + pad) + (height - 1) / 2, range(rows))
    return ax


def plot_jacobians(jacobians, figure=None, patch_axes=None, pad=1, limit=None, cmap="RdBu_r"):
    """Shows several Jacobians side by side, each as `plot_as_patches` does, on one scale of colours.

    Of a full Jacobian `(batch, out, batch, in)` each patch is a (batch, batch) slice: where the examples are
    independent, it is diagonal; where a layer such as BatchNormalization in training mode mixes them, it is not, and a
    batch Jacobian has no clear meaning.

    Args:
        jacobians: a dict of them by the titles to give them.
        figure: the matplotlib Figure to draw on; a new one by default.
        patch_axes: as for `plot_as_patches`.
        pad: as for `plot_as_patches`.
        limit: as for `imshow_zero_center`; the largest finite absolute value of all of them by default.
        cmap: as for `imshow_zero_center`.

    Returns:
        The matplotlib Figure, with an Axes for each Jacobian and one for the colour bar.

    Raises:
        ValueError: if there are none, and as `plot_as_patches`.
        ImportError: without matplotlib.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> j = np.einsum("bc,oi->boci", np.eye(4), np.ones((2, 3)))
    >>> figure = kg.plots.plot_jacobians({"independent": j, "mixed": j + 0.1})
    >>> [ax.get_title() for ax in figure.axes[:2]]
    ['independent', 'mixed']
    """
    if not isinstance(jacobians, dict) or not jacobians:
        raise ValueError(
            "plot_jacobians expects a dict of Jacobians by title. Received: "
            f"{'an empty one' if isinstance(jacobians, dict) else validation.describe(jacobians)}."
        )
    shape = "(batch, out, in) or (batch, out, batch, in)"
    arrays = {title: numbers(j, "plot_jacobians", shape, (3, 4)) for title, j in jacobians.items()}
    if limit is None:
        limit = max(np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in arrays.values()) or 1.0
    if figure is None:
        figure = pyplot_or_error().figure(figsize=(5 * len(arrays) + 1, 4.8), layout="constrained")
    panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    for (title, array), ax in zip(arrays.items(), panels, strict=True):
        plot_as_patches(array, ax, patch_axes, pad, limit=limit, cmap=cmap, colorbar=False)
        ax.set_title(title)
    figure.colorbar(panels[-1].images[-1], ax=list(panels), label="derivative")
    return figure


def _as_grid(jacobian, patch_axes):
    """Orders the axes as (rows of patches, columns of patches, height of a patch, width of a patch)."""
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
