"""Second-order optimizers for `kg.models.SecondOrder`, and the result of one of their steps."""

from keras_gradtools.second_order.bfgs import BFGS
from keras_gradtools.second_order.lbfgs import LBFGS
from keras_gradtools.second_order.levenberg_marquardt import LevenbergMarquardt
from keras_gradtools.second_order.newton import Newton
from keras_gradtools.second_order.newton_cg import NewtonCG
from keras_gradtools.second_order.newton_step import NewtonStepResult, StepReason

__all__ = ["BFGS", "LBFGS", "LevenbergMarquardt", "Newton", "NewtonCG", "NewtonStepResult", "StepReason"]


def __dir__() -> list[str]:
    return __all__
