"""Plots of the distances from examples to a misclassification."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Axes
from keras_gradtools.drawing.pyplot import panels
from keras_gradtools.drawing.styles import legend_above_curves, series_style, text_color


def plot_robustness(report: Any, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Plots the distance from each example to a misclassification, as `kg.attacks.robustness_report` estimates it.

    The left plot shows the fraction of all examples whose distance exceeds a given strength. For the attack's distance,
    that is the accuracy under attack. The right plot shows each example's estimates over the attack's distance. Below
    the diagonal, the attack needed a larger perturbation than estimated.

    Args:
        report: A `kg.attacks.RobustnessReport`.
        ax: Two matplotlib Axes in a list. By default, those of a new figure.

    Returns:
        An array of the two matplotlib Axes.

    Raises:
        ValueError: If `report` is not a report, or the model is right on none of its examples.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, 0.0], [0.0, 1.0]], "float32")])
    >>> report = kg.attacks.robustness_report(model, np.array([[0.75, 0.25]], "float32"), [0], verbose=0)
    >>> len(kg.plots.plot_robustness(report))
    2

    Source: As for `kg.attacks.robustness_report`.
    """
    if not hasattr(report, "first_order"):
        raise ValueError(
            "plot_robustness expects a report from kg.attacks.robustness_report. Received: "
            f"{validation.describe(report)}."
        )
    right = report.correct
    if not right.any():
        raise ValueError(
            "plot_robustness expects the report of a model that is right on some example. Received: right on none."
        )
    axes = panels(ax, 2, "plot_robustness", (11, 4.2))
    shares, pairs = axes
    finite = np.isfinite(report.attack)
    end = 1.1 * max(report.attack[finite].max(initial=0.0), np.quantile(report.first_order, 0.95, method="lower"))
    shown = right & finite
    for number, (name, label) in enumerate(_DISTANCES.items()):
        style, distances = series_style(number), getattr(report, name)
        if name == "attack":
            style |= {"color": text_color(shares), "linewidth": 2}
        # Infinite distances are drawn beyond the right edge.
        of_all = np.minimum(distances, 2 * end)
        shares.ecdf(of_all, complementary=True, label=label, markersize=5, markevery=(number / 40, 0.1), **style)
        if name != "attack":
            style |= {"linestyle": "none", "markersize": 5, "alpha": 0.7}
            pairs.plot(report.attack[shown], distances[shown], label=label, **style)
    norm = "l-infinity norm of the change" if report.norm == "inf" else "l2 norm of the change"
    shares.set(
        xlim=(0, end), ylim=(0, 1.02), xlabel=f"strength: {norm}", ylabel="fraction of examples further from an error"
    )
    shares.set_yticks(np.linspace(0, 1, 6))
    shares.set_title("How far are the examples from an error?")
    pairs.axline((0, 0), slope=1, color="0.6", linewidth=1)
    pairs.set(xlim=(0, end), ylim=(0, end), xlabel="distance found by the attack", ylabel="estimated distance")
    pairs.set_title("Estimates against the attack, one point per example")
    for panel in axes:
        panel.grid(alpha=0.3)
        legend_above_curves(panel, 2)
    return axes


_DISTANCES = {
    "first_order": "first order, margin / ||g||",
    "curvature_bound": "bound by curvature (sampled)",
    "lipschitz_bound": "bound by slope (sampled)",
    "attack": "attack",
}
