"""The Fisher information matrix of a model."""

from typing import Literal

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Data, Loss, Variables, Verbose
from keras_gradtools.curvature.data.batch_loss import with_masks_of
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.data.residual_loss import ResidualLoss
from keras_gradtools.curvature.operators.gauss_newton import GaussNewtonOfBatch
from keras_gradtools.curvature.operators.likelihoods import NAMES, likelihood_of
from keras_gradtools.curvature.operators.linear_maps import OfBatch, OuterProducts, Sandwich, taped
from keras_gradtools.curvature.operators.operator import CurvatureOperator
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.transforms.first_order import grad

KINDS = ("exact", "monte_carlo", "empirical")


class Fisher(CurvatureOperator):
    r"""The Fisher information matrix of a model whose loss is a negative log-likelihood.

    $$F = \frac1N \sum_i w_i \, J_i^\top \, \mathbb{E}_{\hat y \sim p(\cdot \mid z_i)}
    \left[ \nabla_z \ell(\hat y, z_i) \, \nabla_z \ell(\hat y, z_i)^\top \right] J_i$$

    where $z_i$ are the outputs for example $i$, $J_i$ their Jacobian with respect to the weights, and $w_i$ the sample
    weight. The labels $\hat y$ are drawn from the distribution that the model predicts: a class from the softmax for a
    cross-entropy, 0 or 1 for a binary cross-entropy, and a number from a Gaussian for the mean squared error. The
    Gaussian is centered at the output and has variance 1/2, so that its negative log-likelihood is the squared error
    up to a constant. If an example has several labels (time steps or output elements), each contributes with its share
    of the loss. Regularizers are not included.

    - `kind="exact"` computes the expectation in closed form. For these losses it equals the Gauss-Newton matrix without
      regularizers.
    - `kind="monte_carlo"` draws `samples` labels for each output, the same ones for every product.
    - `kind="empirical"` uses the labels of the data: $\frac1N \sum_i w_i \nabla_\theta \ell_i \nabla_\theta
      \ell_i^\top$, for any loss with a value for each example. It does not estimate the other two.

    The first two kinds reduce a batch as the loss does. With `reduction="sum"`, the matrix of a batch is multiplied by
    its number of examples, as the Gauss-Newton matrix is. With `"mean_with_sample_weight"`, the weights are divided by
    their mean. The empirical matrix is the formula above for any reduction.

    Args:
        model: As for `kg.curvature.Hessian`.
        loss: As for `kg.curvature.Hessian`. Unless `kind` is `"empirical"`, it must be a categorical, sparse
            categorical or binary cross-entropy or the mean squared error, and the model must have one output.
        data: As for `kg.curvature.Hessian`. With `kind="empirical"`, sample weights have shape `(batch,)`.
        variables: As for `kg.curvature.Hessian`.
        training: As for `kg.curvature.Hessian`.
        kind: `"exact"`, `"monte_carlo"` or `"empirical"`.
        samples: Number of labels that are drawn for each output with `kind="monte_carlo"`.
        seed: An integer that seeds these labels.
        batch_size: As for `kg.curvature.Hessian`.
        verbose: As for `kg.curvature.Hessian`.

    Raises:
        ValueError: As for `kg.curvature.Hessian`. Unless `kind` is `"empirical"`, also for any other loss than those
            above. With `"monte_carlo"`, at the first product, if the model has several outputs.

    Cost:
        A product costs about 5/3 of a gradient over the data on TensorFlow and JAX, and 7/3 on torch.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, activation="sigmoid")])
    >>> model.set_weights([np.zeros((1, 1), "float32")])
    >>> x, y = np.array([[2.0]], "float32"), np.array([[1.0]], "float32")
    >>> kg.curvature.Fisher(model, "binary_crossentropy", (x, y)).dense()  # x^2 p (1 - p)
    array([[1.]], dtype=float32)

    Source: Martens, "New insights and perspectives on the natural gradient method" (arXiv:1412.1193, 2014), sections 5,
    9 and 11.
    """

    def __init__(
        self,
        model: keras.Layer,
        loss: Loss,
        data: Data,
        variables: Variables = None,
        training: bool = False,
        *,
        kind: Literal["exact", "mc", "empirical"] = "exact",
        samples: int = 1,
        seed: int = 0,
        batch_size: int = 256,
        verbose: Verbose = "auto",
    ) -> None:
        self._kind = validation.require_choice("Fisher", "kind", kind, KINDS)
        self._samples = validation.require_count("Fisher", "samples", samples)
        if not validation.is_count(seed, 0) or seed >= 2**31:
            raise validation.refused("Fisher", "an integer from 0 to 2**31 - 1", "seed", seed)
        self._seed_given = int(seed)
        super().__init__(model, loss, data, variables, training, batch_size=batch_size, verbose=verbose)

    def _make_spec(self):
        if isinstance(self._loss, ResidualLoss):
            raise ValueError(
                f"Fisher needs a loss of labels and outputs. Received: loss={self._loss.loss!r}. Use "
                "kg.curvature.GaussNewton, which is the Fisher matrix of residuals with a Gaussian distribution."
            )
        if self._kind == "empirical":
            return _EmpiricalOfBatch(self._loss)
        likelihood = likelihood_of(self._loss.loss)
        if likelihood is None:
            raise ValueError(
                f"Fisher knows the distributions of {', '.join(NAMES)} (over the last axis, without ignored classes). "
                f"Received: loss={validation.describe(self._loss.loss)}. Use kind='empirical', or "
                "kg.curvature.GaussNewton."
            )
        loss = self._loss.of_logits(likelihood)
        if self._kind == "exact":
            return GaussNewtonOfBatch(loss, with_regularizers=False)
        return _MonteCarloOfBatch(loss, likelihood, self._samples, self._seed_given)


class _MonteCarloOfBatch(OfBatch):
    draws_by_batch = True

    def __init__(self, loss, likelihood, samples, seed):
        # The seed is not in the key, since it is an input of the program.
        super().__init__(loss, "monte carlo", samples)
        self._likelihood, self._samples = likelihood, samples
        self._generator = keras.random.SeedGenerator(0)
        self.seed = seed

    def of_batch(self, model, weights, batch, seed):
        x, _, sample_weight = batch
        call = taped("Fisher", lambda w: self.loss.outputs(model, w, x), weights)
        if nesting.is_nested(call.target):
            raise ValueError(f"Fisher needs a model with one output. Received: {len(call.flat_targets)} outputs.")
        z = ops.stop_gradient(call.value)
        state = self._generator.state
        first = ops.stack([seed[0], seed[1] * self._samples])
        samples = []
        scope = StateScope([(state, ops.cast(first, state.dtype))])
        with scope, scope:
            for _ in range(self._samples):
                labels = self._likelihood.sampled(z, self._generator)
                gradient = self._gradient(labels, z, call.target, sample_weight)
                samples.append((gradient, self._likelihood.scores(labels, z)))
        return Sandwich(call, OuterProducts(samples, has_last_axis=len(z.shape) > 1))

    def _gradient(self, labels, z, original, sample_weight):
        """The gradient of the loss for these labels, with its sample weights, masks and means."""

        def loss_of(outputs):
            return self.loss.of_outputs(with_masks_of(outputs, original), labels, sample_weight)

        return grad(loss_of)(z)


class _EmpiricalOfBatch(OfBatch):
    def __init__(self, loss):
        super().__init__(loss, "empirical")

    def of_batch(self, model, weights, batch, seed):
        x, y, sample_weight = batch
        count = batch_size_of(batch)
        call = taped("Fisher", lambda w: self.loss.of_examples(model, w, x, y), weights)
        shares = _weights_of_examples(sample_weight, count, call.target.dtype) / count
        return Sandwich(call, OuterProducts([(shares, ops.ones_like(shares))], has_last_axis=False))


def _weights_of_examples(sample_weight, count, dtype):
    if sample_weight is None:
        return ops.ones((count,), dtype=dtype)
    shapes = [tuple(w.shape) for w in nesting.flatten(sample_weight)]
    if shapes not in ([(count,)], [(count, 1)]):
        raise ValueError(
            f"The empirical Fisher matrix needs one sample weight for each example, of shape ({count},). Received: the "
            f"shapes {shapes}."
        )
    return ops.cast(ops.reshape(nesting.flatten(sample_weight)[0], (count,)), dtype)
