"""Plots of robustness: distances to a misclassification, and accuracies over the weight of a penalty."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Axes
from keras_gradtools.drawing.pyplot import current_axes, panels
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
    # Of a classifier with zero gradients, all of these distances may be infinite.
    estimated = report.first_order[np.isfinite(report.first_order)]
    largest = np.quantile(estimated, 0.95, method="lower") if estimated.size else 0.0
    end = 1.1 * max(report.attack[finite].max(initial=0.0), largest) or 1.0
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


def plot_penalty_weight_sweep(sweep: Any, ax: Axes | None = None) -> Axes:
    """Plots the accuracies of a `kg.regularization.penalty_weight_sweep` over the weight of the penalty.

    The weights are evenly spaced. The bars are standard errors over the examples. A vertical line marks the suggested
    weight, and a dotted line the lowest accuracy without an attack that it may have. Crosses mark models with masked
    gradients.

    Args:
        sweep: A `kg.regularization.PenaltyWeightSweep`.
        ax: The matplotlib Axes to draw on. By default, the current one.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: If `sweep` is not a sweep.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> weights, clean, attacked = np.array([[0.0, 0.1], [0.99, 0.99], [0.5, 0.8]])
    >>> masked = np.array([False, False])
    >>> sweep = kg.regularization.PenaltyWeightSweep(
    ...     weights, clean[:, None], attacked[:, None], masked, max_drop=0.01, epsilon=0.1, norm="inf", examples=100
    ... )
    >>> ax = kg.plots.plot_penalty_weight_sweep(sweep)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['0', '0.1']

    Source: As for `kg.regularization.penalty_weight_sweep`.
    """
    if not hasattr(sweep, "standard_errors"):
        raise ValueError(
            "plot_penalty_weight_sweep expects the result of kg.regularization.penalty_weight_sweep. Received: "
            f"{validation.describe(sweep)}."
        )
    ax = current_axes(ax)
    places = np.arange(len(sweep.penalty_weights))
    for number, (label, accuracies) in enumerate((("clean", sweep.clean), ("under attack", sweep.attacked))):
        mean, error = 100 * accuracies.mean(axis=1), 100 * sweep.standard_errors(accuracies)
        ax.errorbar(places, mean, error, markersize=5, capsize=3, label=label, **series_style(number))
    foreground = text_color(ax)
    if sweep.masked.any():
        masked = 100 * sweep.attacked.mean(axis=1)[sweep.masked]
        ax.plot(places[sweep.masked], masked, "x", color=foreground, markersize=10, label="masked gradients")
    lowest = 100 * (sweep.clean[0].mean() - sweep.max_drop)
    ax.axhline(lowest, color=foreground, linestyle=":", linewidth=1, label="lowest clean accuracy allowed")
    suggested = places[sweep.penalty_weights == sweep.suggestion][0]
    ax.axvline(suggested, color=foreground, linestyle="-.", linewidth=1, label=f"suggested: {sweep.suggestion:g}")
    ax.set_xticks(places, [f"{weight:g}" for weight in sweep.penalty_weights])
    norm = "l-infinity" if sweep.norm == "inf" else "l2"
    ax.set(xlabel="weight of the penalty", ylabel="accuracy (%)")
    ax.set_title(f"Accuracy over the weight, PGD up to {sweep.epsilon:g} ({norm})")
    ax.grid(alpha=0.3)
    legend_above_curves(ax, 2)
    return ax
