"""The pictures of a report, drawn for a light and for a dark page, as SVG images in data URIs."""

import base64
import io

import numpy as np

from keras_gradtools.attacks.plots import plot_robustness
from keras_gradtools.curvature.plots import plot_spectral_density
from keras_gradtools.diagnostics.plots import plot_gradient_flow
from keras_gradtools.drawing.pyplot import pyplot_or_error
from keras_gradtools.drawing.styles import series_style

_STYLES = {"light": "default", "dark": "dark_background"}


def images(draw):
    """A dict from `"light"` and `"dark"` to data URIs of the picture. Empty if matplotlib is not installed."""
    try:
        pyplot = pyplot_or_error()
    except ImportError:
        return {}
    from matplotlib.figure import Figure

    found = {}
    for page, style in _STYLES.items():
        # Figures that pyplot does not know are not shown by a notebook, and need no display.
        with pyplot.style.context(style):
            figure = Figure(figsize=(7.2, 3.6), layout="constrained")
            draw(figure)
            picture = io.BytesIO()
            figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        found[page] = f"data:image/svg+xml;base64,{base64.b64encode(picture.getvalue()).decode()}"
    return found


def draw_spectrum(figure, values):
    """Draws the singular values of all examples, of shape `(batch, r)`."""
    ax = figure.subplots()
    floor = 1e-8 * values.max() or 1e-8
    numbers, values = np.arange(1, values.shape[1] + 1), np.maximum(values, floor)
    style = series_style(0)
    ax.fill_between(numbers, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.3, linewidth=0)
    ax.plot(numbers, np.median(values, axis=0), markersize=4, **style)
    ax.set(xlabel="number of the singular value, from the largest", ylabel="singular value", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def draw_gradients(figure, norms):
    """Draws the gradient norm of each layer, from a dict."""
    plot_gradient_flow({name: [norm] for name, norm in norms.items()}, figure.subplots())


def draw_density(figure, density):
    """Draws a `SpectralDensity`."""
    plot_spectral_density(density, figure.subplots())


def draw_robustness(figure, found):
    """Draws a `RobustnessReport`."""
    figure.set_size_inches(11, 4)
    plot_robustness(found, figure.subplots(1, 2))
