"""Curvature matrices of a loss with respect to the weights of a model: products, spectra, traces, linear solvers."""

from keras_gradtools.curvature.estimators.critical_sharpness import CriticalSharpness, critical_sharpness
from keras_gradtools.curvature.estimators.diagonal import diagonal
from keras_gradtools.curvature.estimators.eigenvalues import EigenvalueConvergenceError, eigsh
from keras_gradtools.curvature.estimators.estimate import Estimate
from keras_gradtools.curvature.estimators.loss_surface import LossSurface, loss_surface
from keras_gradtools.curvature.estimators.spectral_density import SpectralDensity, spectral_density
from keras_gradtools.curvature.estimators.trace import trace
from keras_gradtools.curvature.operators.fisher import Fisher
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.curvature.operators.operator import CurvatureOperator
from keras_gradtools.curvature.solvers.conjugate_gradients import ConjugateGradientsResult, conjugate_gradients
from keras_gradtools.curvature.solvers.damped_solve import DampedSolution, damped_solve

__all__ = [
    "ConjugateGradientsResult",
    "CriticalSharpness",
    "CurvatureOperator",
    "DampedSolution",
    "EigenvalueConvergenceError",
    "Estimate",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LossSurface",
    "SpectralDensity",
    "conjugate_gradients",
    "critical_sharpness",
    "damped_solve",
    "diagonal",
    "eigsh",
    "loss_surface",
    "spectral_density",
    "trace",
]


def __dir__() -> list[str]:
    return __all__
