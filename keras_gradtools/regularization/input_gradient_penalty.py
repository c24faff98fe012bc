"""The penalty on input gradients as a function, for training loops of one's own."""

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.backend import example_losses
from keras_gradtools.chosen_inputs import as_tensors, checked_choice
from keras_gradtools.regularization.penalty import Penalty, chosen_positions
from keras_gradtools.regularization.recorded_call import RecordedCall, Snapshot
from keras_gradtools.regularization.sample_weights import example_weights
from keras_gradtools.regularization.targets import FunctionTarget, LossTarget, OutputsTarget

NAME = "input_gradient_penalty"


def input_gradient_penalty(
    model,
    x,
    y=None,
    *,
    loss=None,
    sample_weight=None,
    target="loss",
    norm=2,
    squared=True,
    center=0.0,
    method="auto",
    step_size=0.1,
    projections=1,
    inputs=None,
    frozen_statistics=False,
    training=True,
    seed=None,
):
    r"""Computes how large the gradient by the inputs is, as a number that can be trained down.

    $$\frac1N \sum_i w_i \, \text{pen}(g_i), \qquad g_i = \frac{\partial \ell_i}{\partial x_i}, \qquad
      \text{pen}(g) = (\lVert g \rVert - \text{center})^2 \text{ or } \bigl| \lVert g \rVert - \text{center} \bigr|$$

    where $x_i$ is one example, $\ell_i$ its contribution to the loss without sample weights, such that the loss is
    $\frac1N \sum_i \ell_i$, and $w_i$ its sample weight. There is no other factor: no 1/2, no division by the size of
    the input. Add it, times a weight, to the loss of a training loop of your own, and differentiate by the model's
    weights with `kg.GradientTape` or with what the framework has. In `fit`, `kg.models.InputGradientRegularized` does.

    The model is called once (with finite differences once more for each number differentiated). What these calls assign
    is dropped (BatchNormalization's statistics, seeds), and so are the losses that they add.

    Args:
        model: a Keras model or layer, or any function of `x`.
        x: tensors or arrays of shape `(batch, ...)`, in any nesting that the model takes.
        y: the labels, for `target="loss"` and for a function that looks at them.
        loss: a Keras loss, its name, or a function `(y, y_pred)`; that of `model.compile` by default.
        sample_weight: numbers of shape `(batch,)`, or `(batch, time)`, whose mean counts.
        target: what is differentiated: `"loss"`; `"outputs"`, all outputs, so that $g_i$ is the Jacobian and its norm
            that of the matrix as one vector; or a function `(y, y_pred)` that returns one number for each example, of
            shape `(batch,)`: a logit, a margin, the score of a critic.
        norm: 1, 2 or `"inf"`, the norm of the gradient. Its dual is the size of the attacks that it answers: 1 is for
            l-infinity attacks, 2 for l2 attacks.
        squared: whether the distance from `center` is squared.
        center: the norm that costs nothing: 1 for the critic of WGAN-GP.
        method: `"exact"`, `"finite_difference"`, `"random_projection"` (of the outputs), or `"auto"`; see
            `kg.models.InputGradientRegularized`.
        step_size: how far finite differences move an example, in units of the input.
        projections: how many random mixtures of the outputs stand for all of them, -1 for all themselves.
        inputs: the names (keys, or positions) of the inputs to differentiate by; all floating-point ones by default.
        frozen_statistics: whether BatchNormalization goes by its moving statistics here, also in training mode, in
            which examples otherwise mix.
        training: the mode in which the model is called.
        seed: an integer or a `keras.random.SeedGenerator` for the projections.

    Returns:
        A scalar tensor, in float32 or more.

    Raises:
        ValueError: for options that do not fit (each is named), inputs without a gradient, or a missing loss.

    Cost:
        `"exact"`: a forward and a backward pass, and about twice as much again where it is differentiated.
        `"finite_difference"`: two forward passes and a backward pass by the inputs, and the derivatives of the two.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> critic = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> critic.set_weights([keras.ops.convert_to_tensor([[3.0], [4.0]])])
    >>> penalty = kg.regularization.input_gradient_penalty(
    ...     critic, keras.ops.ones((8, 2)), target=lambda y, y_pred: y_pred[:, 0], center=1.0)
    >>> round(float(penalty), 4)  # (5 - 1)^2
    16.0

    Source: Drucker & LeCun, "Improving generalization performance using double backpropagation" (1992); Gulrajani et
    al., "Improved training of Wasserstein GANs" (arXiv:1704.00028), equation 3; Hoffman, Roberts & Yaida, "Robust
    learning with Jacobian regularization" (arXiv:1908.02729); Finlay & Oberman, "Scaleable input gradient
    regularization for adversarial robustness" (arXiv:1905.11468).
    """
    penalty = Penalty(NAME, target, norm, squared, center, method, step_size, projections, frozen_statistics)
    names = checked_choice(NAME, inputs)
    validation.require_callable_model(NAME, model)
    validation.require_flag(NAME, "training", training)
    if not isinstance(seed, keras.random.SeedGenerator):
        validation.require_seed(NAME, seed, may_be_none=True, may_be_generator=True)
    if isinstance(model, keras.Layer) and not model.built:
        raise ValueError(
            f"{NAME} takes a built model. Received: {model.name!r}, which is not. Give it a keras.Input, or call it on "
            "data once."
        )
    x = as_tensors(x)
    if any(leaf is not None and not len(leaf.shape) for leaf in nesting.flatten(x)):
        raise ValueError(f"{NAME} expects inputs of shape (batch, ...) as `x`. Received: {validation.shown(x)}.")
    chosen = chosen_positions(NAME, model, x, names)
    choice = penalty.choose(model)
    snapshot = Snapshot(model)
    takes_training = isinstance(model, keras.Layer) and model._call_has_training_arg

    def call(x):
        return model(x, training=training) if takes_training else model(x)

    recorded = RecordedCall(call, x, chosen, snapshot, keeps_state=False)
    found = _target(penalty, choice, model, loss, y, recorded.outputs, seed)
    values = penalty.measure(choice, recorded, found, model, training).values
    if sample_weight is not None:
        weights = example_weights(as_tensors(sample_weight), recorded.outputs, recorded.batch_size)
        values = values * ops.cast(weights, values.dtype)
    return ops.mean(values)


def _target(penalty, choice, model, loss, y, outputs, seed):
    if callable(penalty.target):
        return FunctionTarget(NAME, penalty.target, y)
    if penalty.target == "outputs":
        return OutputsTarget(outputs, choice.projections, seed)
    compiled = getattr(model, "_compile_loss", None) if loss is None else example_losses.compiled(loss)
    if compiled is None:
        raise ValueError(
            f"{NAME} with target='loss' needs a loss. Received: loss=None and a model that was not compiled with one. "
            "Pass one as `loss`, or compile the model."
        )
    return LossTarget(NAME, compiled, as_tensors(y))
