"""What can be said about the derivatives of a model before they are relied on."""

from keras_gradtools.diagnostics.batch_independence import batch_independence
from keras_gradtools.diagnostics.preflight import LayerVerdict, PreflightReport, preflight
from keras_gradtools.independence import BatchIndependence

__all__ = ["BatchIndependence", "LayerVerdict", "PreflightReport", "batch_independence", "preflight"]
