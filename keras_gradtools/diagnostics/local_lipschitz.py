"""Lower bounds of the local Lipschitz constant, within a ball around each example."""

import functools

import keras
import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, nesting, validation
from keras_gradtools.annotations import Function, InputNames, Nested
from keras_gradtools.diagnostics.jacobian_spectrum import outputs_of, require_float_examples, require_inputs, taped
from keras_gradtools.example_norms import for_each, normalized, numbers, split, squares
from keras_gradtools.transforms import compiled

NAME = "local_lipschitz"


def local_lipschitz(
    model: Function,
    x: Nested,
    training: bool = False,
    *,
    radius: float = 0.1,
    iterations: int = 10,
    seed: int = 0,
    inputs: InputNames = None,
) -> np.ndarray:
    r"""Computes a lower bound of the Lipschitz constant of a model within a ball around each example.

    The constant is $\max_{\lVert \delta \rVert \le r} \lVert f(x + \delta) - f(x) \rVert / \lVert \delta \rVert$. It is
    searched for by $\delta \leftarrow r \, g / \lVert g \rVert$ with $g = J(x + \delta)^\top (f(x + \delta) - f(x))$,
    which is power iteration at a finite distance. For a small radius, it approaches the spectral norm of the Jacobian.
    For a larger radius, it includes the effect of kinks and saturation, which the Jacobian at one point does not
    contain.

    Args:
        model: A Keras model, or a function of `x`. The examples must be independent.
        x: Tensors of shape `(batch, ...)`, in any nested structure.
        training: Whether a model is called in training mode.
        radius: $r$, in units of `x`.
        iterations: Number of steps of the search.
        seed: An integer that seeds the initial directions.
        inputs: The names, keys or positions of the inputs to move. By default, all floating-point inputs. The others
            are held constant.

    Returns:
        A NumPy array of shape `(batch,)` with the largest ratio found for each example.

    Raises:
        ValueError: If an option or an input is not valid.

    Cost:
        One input gradient for each iteration, and one evaluation of the model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[3.0, 0.0], [0.0, 0.5]])])
    >>> kg.diagnostics.local_lipschitz(model, np.ones((1, 2), "float32")).round(3).tolist()
    [3.0]

    Source: Yang et al., "A closer look at accuracy vs. robustness" (arXiv:2003.02460, 2020), section 3, but with steps
    of power iteration.
    """
    radius = validation.require_number(NAME, "radius", radius, above=0)
    validation.require_callable_model(NAME, model)
    training = validation.require_flag(NAME, "training", training)
    iterations = validation.require_count(NAME, "iterations", iterations)
    validation.require_seed(NAME, seed)
    kwargs = {"training": training} if isinstance(model, keras.Layer) else {}
    x = require_float_examples(NAME, x)
    chosen = require_inputs(NAME, model, x, chosen_inputs.require_names(NAME, inputs))
    return largest_ratios(model, x, chosen, kwargs, radius, iterations, random_directions(x, chosen, radius, seed))[0]


def random_directions(x, chosen, radius, seed):
    """Random initial perturbations of length `radius` for examples as tensors: one tensor for each chosen input."""
    inputs = chosen.parts(x)
    start = np.concatenate(
        [np.random.default_rng(seed).standard_normal((len(a), int(np.prod(a.shape[1:])))) for a in inputs], axis=1
    )
    return split(radius * start / np.linalg.norm(start, axis=1, keepdims=True), inputs)


def largest_ratios(model, x, chosen, kwargs, radius, iterations, delta):
    """The largest ratio for each example of a search that starts at `delta`, and its last perturbation."""
    radius = ops.convert_to_tensor(radius, dtype=chosen.parts(x)[0].dtype)
    here = outputs_of(NAME, model, x, chosen, kwargs)
    step, ratios = functools.partial(_step, chosen), []
    for _ in range(iterations):
        (ratio, delta), _ = compiled.run(NAME, model, step, ("step", chosen), (x, here, delta, radius), kwargs)
        ratios.append(numbers(ratio))
    return np.max(ratios, axis=0), delta


def _step(chosen, fun, x, here, delta, radius, **kwargs):
    """The ratio at `delta`, and the next `delta`. `here` holds the outputs at `x`."""
    moved = [a + d for a, d in zip(chosen.parts(x), delta, strict=True)]
    there = taped(NAME, chosen, fun, chosen.filled(x, moved), kwargs)
    change = [b - a for a, b in zip(here, there.flat_targets, strict=True)]
    ratio = ops.sqrt(squares(change) / squares(delta))
    gradients = nesting.flatten(there.vjp(nesting.pack_as(there.target, change), is_last=True))
    direction, length = normalized(gradients)
    # Where the gradient is zero, keep the perturbation.
    following = [
        ops.where(for_each(ops.cast(length, d.dtype), d) > 0, ops.cast(radius, d.dtype) * new, d)
        for new, d in zip(direction, delta, strict=True)
    ]
    return (ratio, following), None
