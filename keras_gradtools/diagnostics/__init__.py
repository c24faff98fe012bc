"""What can be said about the derivatives of a model before they are relied on."""

from keras_gradtools.diagnostics.batch_independence import batch_independence
from keras_gradtools.diagnostics.jacobian_spectrum import JacobianSpectrum, jacobian_spectrum
from keras_gradtools.diagnostics.local_lipschitz import local_lipschitz
from keras_gradtools.diagnostics.preflight import LayerVerdict, PreflightReport, preflight
from keras_gradtools.independence import BatchIndependence

__all__ = [
    "BatchIndependence",
    "JacobianSpectrum",
    "LayerVerdict",
    "PreflightReport",
    "batch_independence",
    "jacobian_spectrum",
    "local_lipschitz",
    "preflight",
]
