"""Diagnostics of a model's derivatives, for checks before training and for monitoring."""

from keras_gradtools.diagnostics.dead_units import dead_units
from keras_gradtools.diagnostics.gradient_noise import GradientNoise, gradient_noise_scale
from keras_gradtools.diagnostics.jacobian_spectrum import JacobianSpectrum, jacobian_spectrum
from keras_gradtools.diagnostics.layer_derivatives import layer_derivatives
from keras_gradtools.diagnostics.layer_verdict import LayerDerivatives, LayerVerdict
from keras_gradtools.diagnostics.local_lipschitz import local_lipschitz
from keras_gradtools.diagnostics.model_report.findings import Finding
from keras_gradtools.diagnostics.model_report.report import Report, report
from keras_gradtools.independence.batch_independence import batch_independence
from keras_gradtools.independence.cross_example_gradients import BatchIndependence

__all__ = [
    "BatchIndependence",
    "Finding",
    "GradientNoise",
    "JacobianSpectrum",
    "LayerDerivatives",
    "LayerVerdict",
    "Report",
    "batch_independence",
    "dead_units",
    "gradient_noise_scale",
    "jacobian_spectrum",
    "layer_derivatives",
    "local_lipschitz",
    "report",
]


def __dir__() -> list[str]:
    return __all__
