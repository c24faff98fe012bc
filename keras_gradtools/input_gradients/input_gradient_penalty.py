"""The input gradient penalty as a function, for custom training loops."""

from typing import Literal

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Function, InputNames, Loss, Nested, Tensor
from keras_gradtools.chosen_inputs import as_tensors, require_names
from keras_gradtools.input_gradients.penalty import Penalty, chosen_positions
from keras_gradtools.input_gradients.recorded_call import RecordedCall, Snapshot
from keras_gradtools.input_gradients.sample_weights import example_weights
from keras_gradtools.input_gradients.targets import FunctionTarget, LossTarget, OutputsTarget
from keras_gradtools.keras_state import example_losses

NAME = "input_gradient_penalty"


def input_gradient_penalty(
    model: Function,
    x: Nested,
    y: Nested = None,
    *,
    loss: Loss = None,
    sample_weight: Nested = None,
    target: str | Function = "loss",
    norm: Literal["inf", 1, 2] = 2,
    squared: bool = True,
    center: float = 0.0,
    method: str = "auto",
    step_size: float = 0.1,
    projections: int = 1,
    inputs: InputNames = None,
    frozen_statistics: bool = False,
    training: bool = True,
    seed: int | keras.random.SeedGenerator | None = None,
) -> Tensor:
    r"""Computes a differentiable penalty on the gradient with respect to the inputs.

    $$\frac1N \sum_i w_i \, \text{pen}(g_i), \qquad g_i = \frac{\partial \ell_i}{\partial x_i}, \qquad
      \text{pen}(g) = (\lVert g \rVert - \text{center})^2 \text{ or } \bigl| \lVert g \rVert - \text{center} \bigr|$$

    where $x_i$ is one example, $\ell_i$ its contribution to the loss without sample weights, such that the loss is
    $\frac1N \sum_i \ell_i$, and $w_i$ its sample weight (1 if there are none). There is no other factor: no 1/2, no
    division by the size of the input. Add the penalty, times a weight, to the loss of your training loop, and
    differentiate with respect to the model's weights with `kg.GradientTape` or the framework's own tools. For `fit`,
    use `kg.models.InputGradientRegularized`.

    The model is called once. Finite differences call it once more for each differentiated quantity: the loss, or each
    output or projection. Assignments in these calls (BatchNormalization's statistics, seeds) are dropped, and so are
    the losses that they add.

    Args:
        model: A Keras model or layer, or any function of `x`.
        x: Tensors or arrays of shape `(batch, ...)`, in any nested structure that the model takes.
        y: The labels, for `target="loss"` and for a function as `target`.
        loss: A Keras loss, its name, or a function `(y, y_pred)`. By default, the loss of `model.compile`.
        sample_weight: Weights of shape `(batch,)`, or of shape `(batch, time)`, which are averaged over time.
        target: The quantity to differentiate: `"loss"`; `"outputs"`, all outputs, so that $g_i$ is the Jacobian,
            flattened to one vector for the norm; or a function `(y, y_pred)` that returns one number for each example,
            of shape `(batch,)`, such as a logit, a margin, or the score of a critic.
        norm: The norm of the gradient: 1, 2 or `"inf"`. It is the dual of the norm that bounds an attack: 1 defends
            against l-infinity attacks, 2 against l2 attacks.
        squared: Whether the difference of norm and `center` is squared. Otherwise, its absolute value is used.
        center: The norm with a penalty of zero. For the critic of WGAN-GP, it is 1.
        method: `"exact"`, `"finite_difference"`, `"random_projection"` (for `target="outputs"`), or `"auto"`. See
            `kg.models.InputGradientRegularized`.
        step_size: The step size of finite differences, in units of the input.
        projections: Number of random projections of the outputs, for `target="outputs"`. -1 uses all outputs.
        inputs: The names, keys or positions of the inputs to differentiate with respect to. By default, all
            floating-point inputs.
        frozen_statistics: Whether BatchNormalization uses its moving statistics here even in training mode, where its
            batch statistics mix the examples.
        training: Whether the model is called in training mode.
        seed: An integer or a `keras.random.SeedGenerator` for the projections.

    Returns:
        A scalar tensor, in float32 or float64.

    Raises:
        ValueError: If an option is not valid (the message names it), if an input has no gradient, or if a loss is
            missing.

    Cost:
        `"exact"`: a forward and a backward pass. Differentiating the penalty costs about twice as much again.
        `"finite_difference"`: two forward passes and a backward pass with respect to the inputs. Differentiating the
        penalty takes a backward pass through both forward passes.

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
    names = require_names(NAME, inputs)
    validation.require_callable_model(NAME, model)
    validation.require_flag(NAME, "training", training)
    seed = validation.require_seed(NAME, seed, may_be_none=True, may_be_generator=True)
    if isinstance(model, keras.Layer):
        validation.require_built(NAME, model)
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
