"""What can be said about the derivatives of a model before they are relied on."""

from keras_gradtools.diagnostics.preflight import LayerVerdict, PreflightReport, preflight

__all__ = ["LayerVerdict", "PreflightReport", "preflight"]
