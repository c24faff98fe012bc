"""Colors, markers and line styles that can be told apart on light and dark pages, also without colors."""

import math

import numpy as np

# The colors of Okabe & Ito, "Color universal design" (2008), without black and yellow.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", "-.", ":")
# The part of a graded color map that is visible on a light and on a dark background.
_ON_LIGHT, _ON_DARK = (0.0, 0.8), (0.35, 1.0)
# The share of the height of an Axes that a row of a legend takes.
_ROW = 0.075


def series_style(number):
    """The color, marker and line style of a series, as options of `Axes.plot`. The first 36 all differ."""
    return {"color": _COLORS[number % len(_COLORS)], **_shape(number)}


def graded_styles(ax, count):
    """`series_style` for ordered series: a color map from dark to light in place of the colors."""
    return [{"color": color, **_shape(i)} for i, color in enumerate(graded_colors(ax, count))]


def graded_colors(ax, count):
    """Colors whose lightness rises, all of them visible on the background of `ax`."""
    from matplotlib import pyplot

    ends = _ON_DARK if is_dark(ax) else _ON_LIGHT
    return pyplot.get_cmap("viridis")(np.linspace(*ends, count))


def is_dark(ax):
    """Whether the background of `ax` is dark."""
    from matplotlib.colors import to_rgba

    *rgb, alpha = to_rgba(ax.get_facecolor())
    behind = to_rgba(ax.figure.get_facecolor())[:3]
    return float(np.mean(alpha * np.array(rgb) + (1 - alpha) * np.array(behind))) < 0.5


def text_color(ax):
    """The color of the text of `ax`, for lines that must be visible on its background."""
    return ax.xaxis.label.get_color()


def legend_above_curves(ax, columns=1):
    """Adds a legend in the upper part of `ax`, and extends the vertical axis so that no curve is below it."""
    _, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    share = _ROW * math.ceil(len(labels) / columns) + 0.03
    transform = ax.yaxis.get_transform()
    low, high = transform.transform(np.array(ax.get_ylim()))
    extended = transform.inverted().transform(np.array([low, low + (high - low) / (1 - share)]))
    ax.set_ylim(*extended)
    ax.legend(loc="upper right", ncols=columns, fontsize="small", framealpha=0.8, borderaxespad=0.3)


def _shape(number):
    return {"marker": _MARKERS[number % len(_MARKERS)], "linestyle": _LINES[number % len(_LINES)]}
