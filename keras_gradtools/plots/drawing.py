"""What all pictures begin with: numbers, and matplotlib."""

from keras_gradtools import validation


def numbers(values, name, shape, ranks):
    """Returns `values` as an array in double precision, and raises `ValueError` unless it has one of these ranks."""
    array = validation.as_array(values, f"{name} expects real numbers of shape {shape}")
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(
            f"{name} expects real numbers of shape {shape}, no axis of which is empty. "
            f"Received: {validation.describe(array)}. Reshape it, or take the part that is to be shown."
        )
    return array.astype("float64")


def pyplot_or_error():
    """Returns `matplotlib.pyplot`."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'keras_gradtools.plots draws with matplotlib, which is not installed: pip install "keras-gradtools[plots]"'
        ) from error
    return pyplot
