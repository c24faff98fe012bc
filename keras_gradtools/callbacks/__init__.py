"""Callbacks that measure gradients and curvature during `fit`, or take steps based on them."""

from keras_gradtools.callbacks.batch_jacobian_monitor import BatchJacobianMonitor
from keras_gradtools.callbacks.curvature_monitor import CurvatureMonitor
from keras_gradtools.callbacks.gradient_monitor import GradientMonitor
from keras_gradtools.callbacks.monitor import Monitor
from keras_gradtools.callbacks.newton_step import NewtonStep
from keras_gradtools.callbacks.robustness_monitor import RobustnessMonitor

__all__ = ["BatchJacobianMonitor", "CurvatureMonitor", "GradientMonitor", "Monitor", "NewtonStep", "RobustnessMonitor"]
