"""How far a model's outputs move when its inputs do, within a ball around each example."""

import functools

import keras
import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, nesting, validation
from keras_gradtools.diagnostics.example_vectors import for_each, normalized, numbers, split, squares
from keras_gradtools.diagnostics.jacobian_spectrum import checked_examples, checked_inputs, outputs_of, taped
from keras_gradtools.transforms import compiled

NAME = "local_lipschitz"


def local_lipschitz(model, x, radius=0.1, training=False, *, iterations=10, seed=0, inputs=None):
    r"""The Lipschitz constant of a model within a ball around each example, from below.

    $\max_{\lVert \delta \rVert \le r} \lVert f(x + \delta) - f(x) \rVert / \lVert \delta \rVert$, searched for by
    $\delta \leftarrow r \, g / \lVert g \rVert$ with $g = J(x + \delta)^\top (f(x + \delta) - f(x))$: power iteration
    at a finite distance. For a small radius it is the spectral norm of the Jacobian; for a larger one it sees the kinks
    and saturations that the Jacobian does not.

    Args:
        model: a Keras model or a function of `x` whose examples are independent of one another.
        x: tensors of shape `(batch, ...)`, in any nesting.
        radius: $r$, in units of `x`.
        training: the mode in which a model is called.
        iterations: steps of the search.
        seed: of the directions that it begins with.
        inputs: the names (keys, or positions) of the inputs to move; all floating-point ones by default. The others
            stay as they are.

    Returns:
        A NumPy array of shape `(batch,)`: the largest ratio that was met for each example, a lower bound.

    Raises:
        ValueError: for options or inputs that do not fit.

    Cost:
        For each iteration a gradient by the inputs; and one evaluation of the model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[3.0, 0.0], [0.0, 0.5]])])
    >>> kg.diagnostics.local_lipschitz(model, np.ones((1, 2), "float32")).round(3).tolist()
    [3.0]

    Source: Yang et al., "A closer look at accuracy vs. robustness" (arXiv:2003.02460, 2020), section 3, with the steps
    of power iteration.
    """
    check_radius(NAME, radius)
    validation.require_callable_model(NAME, model)
    validation.require_flag(NAME, "training", training)
    validation.require_count(NAME, "iterations", iterations)
    validation.require_seed(NAME, seed)
    kwargs = {"training": training} if isinstance(model, keras.Layer) else {}
    x = checked_examples(NAME, x)
    chosen = checked_inputs(NAME, model, x, chosen_inputs.checked_choice(NAME, inputs))
    return largest_ratios(model, x, chosen, kwargs, radius, iterations, random_directions(x, chosen, radius, seed))[0]


def check_radius(name, radius):
    """Raises `ValueError` unless it is a positive number."""
    validation.require_positive(name, "radius", radius)


def random_directions(x, chosen, radius, seed):
    """Where the search begins, of examples in tensors: a tensor for each chosen input."""
    inputs = chosen.parts(x)
    start = np.concatenate(
        [np.random.default_rng(seed).standard_normal((len(a), int(np.prod(a.shape[1:])))) for a in inputs], axis=1
    )
    return split(radius * start / np.linalg.norm(start, axis=1, keepdims=True), inputs)


def largest_ratios(model, x, chosen, kwargs, radius, iterations, delta):
    """What the search comes to from `delta`, of examples in tensors; and where it ended."""
    radius = ops.convert_to_tensor(radius, dtype=chosen.parts(x)[0].dtype)
    here = outputs_of(NAME, model, x, chosen, kwargs)
    step, ratios = functools.partial(_step, chosen), []
    for _ in range(iterations):
        (ratio, delta), _ = compiled.run(NAME, model, step, ("step", chosen), (x, here, delta, radius), kwargs)
        ratios.append(numbers(ratio))
    return np.max(ratios, axis=0), delta


def _step(chosen, fun, x, here, delta, radius, **kwargs):
    """The ratio at `delta`, and the next one; `here` are the outputs at `x`."""
    moved = [a + d for a, d in zip(chosen.parts(x), delta, strict=True)]
    there = taped(NAME, chosen, fun, chosen.filled(x, moved), kwargs)
    change = [b - a for a, b in zip(here, there.flat_targets, strict=True)]
    ratio = ops.sqrt(squares(change) / squares(delta))
    pulled = nesting.flatten(there.pull(nesting.pack_as(there.target, change), is_last=True))
    direction, length = normalized(pulled)
    # Where the gradient is zero, there is nowhere to go.
    following = [
        ops.where(for_each(length, d) > 0, ops.cast(radius, d.dtype) * new, d)
        for new, d in zip(direction, delta, strict=True)
    ]
    return (ratio, following), None
