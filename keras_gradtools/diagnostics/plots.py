"""Plots of what monitors measured during training: singular values, and gradients by layer."""

from typing import Any

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Axes
from keras_gradtools.drawing.pyplot import current_axes, epochs_or_measurements
from keras_gradtools.drawing.styles import graded_colors, graded_styles, legend_above_curves

# Up to this many curves are named in a legend. More of them get a color bar.
_MOST_NAMES = 5
# On a logarithmic scale, zeros are drawn at this fraction of the largest value.
_FLOOR = 1e-8


def plot_singular_values(spectra: Any, ax: Axes | None = None) -> Axes:
    r"""Plots the singular values of Jacobians over training, on a logarithmic scale.

    There is one line for each $i$, the median of $\sigma_i$ over the examples. For the largest and the smallest
    singular value, a band shows their range over the examples. A dotted line marks 1, the value of all singular values
    of an isometry. Values that are not finite leave a gap.

    Args:
        spectra: A list of arrays of shape `(batch, r)`, one for each measurement, such as the `spectra` of a
            `kg.callbacks.BatchJacobianMonitor`, or the monitor itself.
        ax: The matplotlib Axes to draw on. By default, the current one.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If there is no measurement, or their shapes differ.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.plot_singular_values([np.array([[2.0, 0.5]]), np.array([[1.5, 0.8]])])
    >>> ax.get_yscale(), ax.get_xlabel()
    ('log', 'measurement')

    Source: Pennington, Schoenholz & Ganguli, "Resurrecting the sigmoid in deep learning through dynamical isometry"
    (arXiv:1711.04735, 2017).
    """
    given = getattr(spectra, "spectra", spectra)
    is_list = isinstance(given, (list, tuple, np.ndarray)) and len(given)
    arrays = [np.asarray(values, "float64") for values in given] if is_list else []
    if not arrays or arrays[0].ndim != 2 or not arrays[0].size or {a.shape for a in arrays} != {arrays[0].shape}:
        raise ValueError(
            "plot_singular_values expects the `spectra` of a BatchJacobianMonitor that has measured, arrays of one "
            f"shape (batch, r). Received: {_described(spectra, given, arrays)}. A monitor has none if it does not "
            "form the Jacobian: see its `method` and `quantities`."
        )
    values = np.stack(arrays)
    finite = values[np.isfinite(values)]
    floor = _FLOOR * finite.max(initial=0.0) or _FLOOR
    values = np.where(np.isfinite(values), np.maximum(values, floor), np.nan)
    ax = current_axes(ax)
    steps, label = epochs_or_measurements(spectra, len(values))
    last = values.shape[2] - 1
    medians = _over_examples(np.median, values)
    styles = graded_styles(ax, last + 1)
    for i in sorted({0, last}):
        ends = [_over_examples(bound, values[:, :, i : i + 1])[:, 0] for bound in (np.min, np.max)]
        ax.fill_between(steps, *ends, color=styles[i]["color"], alpha=0.2, linewidth=0)
    for i, style in enumerate(styles):
        name = rf"$\sigma_{{{i + 1}}}$" if last < _MOST_NAMES else None
        ax.plot(steps, medians[:, i], linewidth=1.2, markersize=4, label=name, **style)
    ax.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set(xlabel=label, ylabel="singular value, median over the examples")
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.grid(alpha=0.3)
    if last < _MOST_NAMES:
        legend_above_curves(ax, _MOST_NAMES)
    else:
        _color_bar(ax, 1, last + 1, "number of the singular value, from the largest")
    return ax


def plot_gradient_flow(layers: Any, ax: Axes | None = None, quantity: str = "gradient_norm") -> Axes:
    r"""Plots a quantity of each layer, from the input to the output, over training.

    There is one line for each measurement, from dark for the first to light for the last. Gradient norms that fall
    towards the input indicate vanishing gradients. Gradient norms that rise towards it indicate exploding ones.

    Args:
        layers: A dict from the name of each layer, in their order, to its values in all measurements, such as an entry
            of the `layers` of a `kg.callbacks.GradientMonitor`. Alternatively, the monitor itself, or the result of a
            `fit` with the monitor.
        ax: The matplotlib Axes to draw on. By default, the current one.
        quantity: The quantity of the monitor to plot: `"gradient_norm"`, `"update_to_weight_ratio"` or `"dead_units"`.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import keras_gradtools as kg
    >>> ax = kg.plots.plot_gradient_flow({"hidden": [0.1, 0.2], "out": [1.0, 0.5]})
    >>> [label.get_text() for label in ax.get_xticklabels()], ax.get_ylabel()
    (['hidden', 'out'], 'gradient norm')

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010).
    """
    curves = _by_layer(layers, quantity)
    # Some quantities, such as dead units, are not measured at first for some layers, which then have fewer values.
    count = max(map(len, curves.values()), default=0)
    if not count:
        raise ValueError(
            "plot_gradient_flow expects as `layers` a dict of values by layer, or a GradientMonitor or history with "
            f"{quantity!r} by layer. Received: {validation.describe(layers)}. "
            "Pass `fit` a kg.callbacks.GradientMonitor."
        )
    values = np.full((count, len(curves)), np.nan)
    for place, column in enumerate(curves.values()):
        values[count - len(column) :, place] = column
    values[~np.isfinite(values)] = np.nan
    steps, label = epochs_or_measurements(layers, count)
    ax = current_axes(ax)
    is_share = quantity == "dead_units"
    if not is_share:
        floor = _FLOOR * np.nanmax(values, initial=0.0) or _FLOOR
        values = np.maximum(values, floor)
        ax.set_yscale("log")
    places = np.arange(len(curves))
    for style, row, step in zip(graded_styles(ax, count), values, steps, strict=True):
        name = f"{label} {step}" if 1 < count <= _MOST_NAMES else None
        ax.plot(places, row, linewidth=1.2, markersize=4, label=name, **style)
    ax.set_xticks(places, list(curves), rotation=40, ha="right", rotation_mode="anchor")
    ax.set(xlabel="layer, from input to output", ylabel=_LABELS[quantity])
    ax.set_xlim(-0.5, len(curves) - 0.5)
    if is_share:
        ax.set_ylim(-0.02, 1.02)
    ax.grid(alpha=0.3)
    if count > _MOST_NAMES:
        _color_bar(ax, steps[0], steps[-1], label)
    else:
        legend_above_curves(ax, _MOST_NAMES)
    return ax


_LABELS = {
    "gradient_norm": "gradient norm",
    "update_to_weight_ratio": "length of the update / length of the weights",
    "dead_units": "fraction of dead units",
}


def _by_layer(given, quantity):
    validation.require_choice("plot_gradient_flow", "quantity", quantity, _LABELS)
    given = getattr(given, "layers", getattr(given, "history", given))
    if not isinstance(given, dict):
        return {}
    if isinstance(given.get(quantity), dict):
        return given[quantity]
    prefix = f"{quantity}/"
    of_history = {name.removeprefix(prefix): v for name, v in given.items() if str(name).startswith(prefix)}
    if of_history or quantity in given or not all(isinstance(v, (list, tuple, np.ndarray)) for v in given.values()):
        return of_history
    return given


def _described(spectra, given, arrays):
    if arrays:
        return f"the shapes {sorted({a.shape for a in arrays})}"
    return "an empty list" if isinstance(given, (list, tuple)) else validation.describe(spectra)


def _over_examples(reduce, values):
    """`reduce` over the finite values along axis 1; NaN where there are none."""
    masked = np.ma.masked_invalid(values)
    if reduce is np.median:
        return np.ma.median(masked, axis=1).filled(np.nan)
    return getattr(masked, reduce.__name__)(axis=1).filled(np.nan)


def _color_bar(ax, first, last, label):
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap(graded_colors(ax, 256))
    bar = ax.figure.colorbar(ScalarMappable(Normalize(first, last), colors), ax=ax, label=label)
    bar.locator = _whole_numbers()
    bar.update_ticks()


def _whole_numbers():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
