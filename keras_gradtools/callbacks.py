"""Callbacks that measure gradients and curvature during `fit`, or take steps based on them."""

from keras_gradtools.attacks.robustness_monitor import RobustnessMonitor
from keras_gradtools.curvature.curvature_monitor import CurvatureMonitor
from keras_gradtools.diagnostics.batch_jacobian_monitor import BatchJacobianMonitor
from keras_gradtools.diagnostics.gradient_monitor import GradientMonitor
from keras_gradtools.second_order.newton_step_callback import NewtonStep
from keras_gradtools.training.monitor import Monitor

__all__ = ["BatchJacobianMonitor", "CurvatureMonitor", "GradientMonitor", "Monitor", "NewtonStep", "RobustnessMonitor"]


def __dir__() -> list[str]:
    return __all__
