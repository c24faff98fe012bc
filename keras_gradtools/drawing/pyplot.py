"""What all plots share: the check of the numbers to draw, and the import of matplotlib."""

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
