"""The generalized Gauss-Newton matrix of a training loss."""

from keras_gradtools.curvature.data.batch_loss import with_masks_of
from keras_gradtools.curvature.operators.likelihoods import likelihood_of
from keras_gradtools.curvature.operators.linear_maps import OfBatch, Sandwich, SecondDerivative, Sum, taped
from keras_gradtools.curvature.operators.operator import CurvatureOperator


class GaussNewton(CurvatureOperator):
    r"""The generalized Gauss-Newton matrix of a training loss, $G = \frac1N \sum_b n_b J_b^\top H_b J_b + R$.

    $J_b$ is the Jacobian of the model's outputs for batch $b$ with respect to its weights, $H_b$ the Hessian of the
    loss with respect to these outputs, and $R$ the Hessian of the weight regularizers. Batch $b$ has $n_b$ of the $N$
    examples. Other losses that layers add are left out. $G$ is the Hessian without the terms that contain second
    derivatives of the model. Without regularizers, it is positive semi-definite if the loss is convex in the outputs.
    For a cross-entropy of probabilities, the logits take the place of the outputs, since the loss is convex in them.
    The matrix then equals that of the same model with a loss `from_logits`.

    Args:
        model: As for `kg.curvature.Hessian`.
        loss: As for `kg.curvature.Hessian`.
        data: As for `kg.curvature.Hessian`.
        variables: As for `kg.curvature.Hessian`.
        training: As for `kg.curvature.Hessian`.
        batch_size: As for `kg.curvature.Hessian`.
        verbose: As for `kg.curvature.Hessian`.

    Raises:
        ValueError: As for `kg.curvature.Hessian`.

    Cost:
        A product costs about 5/3 of a gradient over the data on TensorFlow and JAX, and 7/3 on torch.

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
    """The Gauss-Newton matrix of one batch, as a linear map."""

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
