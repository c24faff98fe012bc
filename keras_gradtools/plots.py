"""Plots of gradients, Jacobians, curvature and robustness. They need matplotlib: `keras-gradtools[plots]`."""

from keras_gradtools.attacks.plots import plot_penalty_weight_sweep, plot_robustness
from keras_gradtools.curvature.plots import (
    plot_eigenvalue_history,
    plot_hessian,
    plot_loss_surface,
    plot_spectral_density,
)
from keras_gradtools.diagnostics.plots import plot_gradient_flow, plot_singular_values
from keras_gradtools.drawing.matrices import imshow_zero_center, plot_as_patches, plot_jacobians

__all__ = [
    "imshow_zero_center",
    "plot_as_patches",
    "plot_eigenvalue_history",
    "plot_gradient_flow",
    "plot_hessian",
    "plot_jacobians",
    "plot_loss_surface",
    "plot_penalty_weight_sweep",
    "plot_robustness",
    "plot_singular_values",
    "plot_spectral_density",
]


def __dir__() -> list[str]:
    return __all__
