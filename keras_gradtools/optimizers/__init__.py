"""Second-order optimizers, for `kg.models.SecondOrder`."""

from keras_gradtools.optimizers.levenberg_marquardt import LevenbergMarquardt
from keras_gradtools.optimizers.newton import Newton
from keras_gradtools.optimizers.newton_cg import NewtonCG

__all__ = ["LevenbergMarquardt", "Newton", "NewtonCG"]
