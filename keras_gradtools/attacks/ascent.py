"""Projected gradient ascent: one step, the measurements around it, and compiled programs for both.

A step follows the gradient of the objective, then is projected onto the ball and clipped to the range of the data.
`badness`, of shape `(batch,)`, says how bad the outputs are: larger is worse (see `Objective`).
"""

from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.data_range import bounds
from keras_gradtools.attacks.perturbed_input import OfOneInput, called, constant_weights, output_activation
from keras_gradtools.example_norms import for_each
from keras_gradtools.transforms import compiled


def input_gradients(model, objective, x, y):
    """The input gradient of each example's objective, as a constant; the objective; and the badness."""
    x = backend.alias(x)
    scope = constant_weights(model)
    with scope, scope:
        tape = backend.Tape(watch_accessed_variables=False)
        with tape, tape:
            tape.watch(x)
            values, badness = objective(y, called(model, x), output_activation(model))
        (gradients,) = backend.constant_pullback(tape, [values], [x], [ops.ones_like(values)])
    if gradients is None:
        raise ValueError(
            "An attack needs outputs that depend differentiably on the input. Received: a model without a gradient "
            f"with respect to its input of dtype {validation.dtype_of(x)} and shape {tuple(x.shape)}."
        )
    return gradients, values, badness


def ascend(model, objective, norm, moved, x, y, epsilon, step_size, low, high):
    """The end point of one ascent step from `moved`, and the badness at `moved`."""
    gradients, _, badness = input_gradients(model, objective, moved, y)
    step = for_each(step_size, x) * ops.cast(norm_balls.steepest(gradients, norm), x.dtype)
    further = x + norm_balls.projected(moved + step - x, epsilon, norm)
    # If x is in the range, clipping moves no element further from x, so the result stays in the ball.
    return ops.clip(further, low, high), badness


def look(model, objective, norm, moved, y, best, worst):
    """Updates the worst examples found so far, and their badness, with `moved`."""
    return _worse(measure_badness(model, objective, norm, moved, y), moved, best, worst)


def measure_gradients(model, objective, norm, x, y):
    """The l2 norm of each gradient, whatever the `norm` of the attack, and the badness of each example."""
    gradients, _, badness = input_gradients(model, objective, x, y)
    return norm_balls.lengths(ops.cast(gradients, badness.dtype), 2), badness


def measure_slopes(model, objective, norm, x, y):
    """The objective, the dual norm of its gradient, and the steepest ascent direction of norm 1."""
    gradients, values, _ = input_gradients(model, objective, x, y)
    gradients = ops.cast(gradients, values.dtype)
    return values, norm_balls.dual_lengths(gradients, norm), norm_balls.steepest(gradients, norm)


def measure_badness(model, objective, norm, x, y):
    """The badness of each example."""
    scope = constant_weights(model)
    with scope, scope:
        return objective(y, called(model, x), output_activation(model))[1]


def ascend_and_look(model, objective, norm, moved, x, y, best, worst, *options):
    """`ascend` from `moved`, and `look` at `moved`, with one gradient for both."""
    further, badness = ascend(model, objective, norm, moved, x, y, *options)
    return (further, *_worse(badness, moved, best, worst))


def just_ascend(model, objective, norm, *args):
    """The end point of `ascend`, without the badness."""
    return ascend(model, objective, norm, *args)[0]


def _worse(badness, moved, best, worst):
    badness = ops.cast(badness, worst.dtype)
    is_worse = badness > worst
    return ops.where(for_each(is_worse, moved), moved, best), ops.where(is_worse, badness, worst)


class CompiledAscent:
    """Ascent on one model, compiled once for each objective, norm and shape.

    `examples`, an `Examples`, says which of the model's inputs is perturbed. `carry` sets the values of the others.
    """

    def __init__(self, model, norm, clip, examples=None):
        self._model, self._norm, self._clip = model, norm, clip
        self._chosen = None if examples is None else examples.chosen
        self._programs, self._inputs = {}, None

    def carry(self, inputs):
        """Sets all inputs of the batch, as tensors. The value of the perturbed input is ignored."""
        self._inputs = inputs

    def step(self, objective, x, y, epsilon):
        """The end point of one step of length `epsilon` from `x`."""
        return self._run(just_ascend, objective, x, x, y, epsilon, epsilon, *bounds(self._clip, x.dtype))

    def gradient_lengths(self, objective, x, y):
        """The l2 norm of each gradient, and the badness of each example."""
        return self._run(measure_gradients, objective, x, y)

    def slopes(self, objective, x, y):
        """The objective, the dual norm of its gradient, and the steepest ascent direction of norm 1."""
        return self._run(measure_slopes, objective, x, y)

    def badness(self, objective, x, y):
        """The badness of each example."""
        return self._run(measure_badness, objective, x, y)

    def worst(self, runs, x, y, epsilon, steps, rate):
        """The worst examples that several runs visit, `x` included, and their badness.

        `runs` holds pairs of an objective and the initial perturbations. The step size is `rate * epsilon`.
        """
        low, high = bounds(self._clip, x.dtype)
        best, worst = x, ops.full((len(x),), float("-inf"))
        best, worst = self._run(look, runs[0][0], x, y, best, worst)
        for objective, start in runs:
            moved = ops.clip(x + start, low, high)
            for _ in range(steps):
                args = (moved, x, y, best, worst, epsilon, rate * epsilon, low, high)
                moved, best, worst = self._run(ascend_and_look, objective, *args)
            best, worst = self._run(look, objective, moved, y, best, worst)
        return best, worst

    def _run(self, part, objective, *args):
        program = self._programs.get((part, objective))
        if program is None:
            norm, chosen = self._norm, self._chosen

            def body(model, inputs, *args):
                of_one = model if chosen is None else OfOneInput(model, chosen, inputs)
                return part(of_one, objective, norm, *args), None

            # The program is cached on the model, so `body` must not hold a reference to the model.
            options = (part, objective, norm, chosen)
            program = compiled.prepare("attack", self._model, body, options, (self._inputs, *args), {})
            self._programs[part, objective] = program
        return program((self._inputs, *args), {})[0]
