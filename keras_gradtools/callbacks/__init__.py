"""Callbacks that look at gradients while `fit` runs."""

from keras_gradtools.callbacks.robustness_monitor import RobustnessMonitor

__all__ = ["RobustnessMonitor"]
