"""Curvature matrices of a loss with respect to the weights of a model: products, spectra, traces, linear solvers."""

from keras_gradtools.curvature.conjugate_gradients import ConjugateGradientsResult, conjugate_gradients
from keras_gradtools.curvature.damped_solve import DampedSolution, damped_solve
from keras_gradtools.curvature.diagonal import diagonal
from keras_gradtools.curvature.eigenvalues import EigenvalueConvergenceError, eigsh
from keras_gradtools.curvature.estimate import Estimate
from keras_gradtools.curvature.fisher import Fisher
from keras_gradtools.curvature.gauss_newton import GaussNewton
from keras_gradtools.curvature.hessian import Hessian
from keras_gradtools.curvature.loss_surface import LossSurface, loss_surface
from keras_gradtools.curvature.newton_step import NewtonStepResult, StepReason
from keras_gradtools.curvature.operator import CurvatureOperator
from keras_gradtools.curvature.spectral_density import SpectralDensity, spectral_density
from keras_gradtools.curvature.trace import trace

__all__ = [
    "ConjugateGradientsResult",
    "CurvatureOperator",
    "DampedSolution",
    "EigenvalueConvergenceError",
    "Estimate",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LossSurface",
    "NewtonStepResult",
    "SpectralDensity",
    "StepReason",
    "conjugate_gradients",
    "damped_solve",
    "diagonal",
    "eigsh",
    "loss_surface",
    "spectral_density",
    "trace",
]
