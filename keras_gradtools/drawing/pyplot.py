"""What all plots share: the check of the numbers to draw, the import of matplotlib, and the Axes to draw on."""

import numpy as np

from keras_gradtools import validation


def numbers(values, name, shape, ranks):
    """Returns `values` as an array in double precision.

    Raises `ValueError` unless it is real and not empty, and its rank is one of `ranks`.
    """
    array = validation.as_array(values, f"{name} expects real numbers of shape {shape}")
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(
            f"{name} expects real numbers of shape {shape}, without empty axes. "
            f"Received: {validation.describe(array)}. Reshape it, or select the part to plot."
        )
    return array.astype("float64")


def pyplot_or_error():
    """Returns `matplotlib.pyplot`, and raises `ImportError` if matplotlib is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'keras_gradtools.plots draws with matplotlib, which is not installed: pip install "keras-gradtools[plots]"'
        ) from error
    return pyplot


def current_axes(ax):
    """Returns `ax`, or the current Axes. A new figure gets a layout that leaves room for all labels."""
    pyplot = pyplot_or_error()
    if ax is not None:
        return ax
    figure = pyplot.gcf()
    if not figure.axes:
        figure.set_layout_engine("constrained")
    return figure.gca()


def panels(ax, count, owner, figsize):
    """Returns an array of `count` Axes: those in `ax`, or the ones of a new figure."""
    if ax is None:
        _, made = pyplot_or_error().subplots(1, count, figsize=figsize, layout="constrained", squeeze=False)
        return made[0]
    given = ax if isinstance(ax, (list, tuple, np.ndarray)) else [ax]
    flat = np.array(given, dtype=object).ravel()
    if len(flat) != count or not all(hasattr(one, "plot") for one in flat):
        received = f"{len(flat)} objects" if len(flat) != count else f"{validation.shown(ax)}"
        raise ValueError(
            f"{owner} expects {count} matplotlib Axes in a list as `ax`. Received: {received}. Make them with "
            f"`pyplot.subplots(1, {count})`, or leave `ax` out for a new figure."
        )
    return flat


def epochs_or_measurements(given, count):
    """The horizontal positions of `count` measurements, and the label of their axis.

    Epochs count from 1, as in the output of `fit`. They are known for a monitor, for the result of `fit`, and for its
    dict if the loss has as many values.
    """
    steps, unit = getattr(given, "measured_at", None), getattr(given, "step_unit", "epoch")
    if steps is None and getattr(given, "epoch", None) is not None:
        steps = given.epoch
    if isinstance(given, dict) and len(given.get("loss", ())) == count:
        steps = range(count)
    if steps is None or len(steps) != count or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        return np.arange(1, count + 1), "measurement"
    return np.asarray(steps) + (unit == "epoch"), unit
