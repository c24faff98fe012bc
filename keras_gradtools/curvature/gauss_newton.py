"""The generalized Gauss-Newton matrix of a training loss."""

from keras_gradtools.curvature.batch_loss import with_masks_of
from keras_gradtools.curvature.likelihoods import likelihood_of
from keras_gradtools.curvature.linear_maps import OfBatch, Sandwich, SecondDerivative, Sum, taped
from keras_gradtools.curvature.operator import CurvatureOperator


class GaussNewton(CurvatureOperator):
    r"""The generalized Gauss-Newton matrix of a training loss, $G = \frac1N \sum_b n_b J_b^\top H_b J_b + R$.

    $J_b$ is the Jacobian of the model's outputs for batch $b$ by its weights, $H_b$ the Hessian of the loss by these
    outputs, and $R$ that of the regularizers of the weights; other losses that layers add are left out. It is the
    Hessian without the curvature of the model itself, and positive semi-definite where the loss is convex in the
    outputs. Where the loss is a cross-entropy of probabilities, the outputs are their logarithms (the logits), in
    which it is convex: the matrix is that of the same model with a loss `from_logits`.

    Args:
        model: as for `kg.curvature.Hessian`, with all other arguments.
        loss: as for `kg.curvature.Hessian`.
        data: as for `kg.curvature.Hessian`.
        variables: as for `kg.curvature.Hessian`.
        training: as for `kg.curvature.Hessian`.
        batch_size: as for `kg.curvature.Hessian`.
        verbose: as for `kg.curvature.Hessian`.

    Raises:
        ValueError: as `kg.curvature.Hessian`.

    Cost:
        A product costs about five thirds of a gradient over the data where a backend compiles, seven thirds on torch.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> x, y = np.array([[1.0, 2.0], [3.0, 4.0]], "float32"), np.zeros((2, 1), "float32")
    >>> kg.curvature.GaussNewton(model, "mse", (x, y)).dense()  # of a linear model the Hessian, 2 x'x / N
    array([[10., 14.],
           [14., 20.]], dtype=float32)

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent" (2002), section 3.
    """

    def _make_spec(self):
        return GaussNewtonOfBatch(self._loss.of_logits(likelihood_of(self._loss.loss)), with_regularizers=True)


class GaussNewtonOfBatch(OfBatch):
    """The Gauss-Newton map of one batch."""

    def __init__(self, loss, with_regularizers):
        super().__init__(loss, with_regularizers)
        self._with_regularizers = with_regularizers

    def of_batch(self, model, weights, batch, seed):
        x, y, sample_weight = batch
        call = taped("GaussNewton", lambda w: self.loss.outputs(model, w, x), weights)

        def loss_of(outputs):
            return self.loss.of_outputs(with_masks_of(outputs, call.target), y, sample_weight)

        gauss_newton = Sandwich(call, SecondDerivative("GaussNewton", loss_of, call.value))
        if not self._with_regularizers or self.loss.regularization(model, weights) is None:
            return gauss_newton
        regularizers = SecondDerivative("GaussNewton", lambda w: self.loss.regularization(model, w), weights)
        return Sum(gauss_newton, regularizers)
