"""One step of an attack: up the gradient of the objective, back into the ball and into the range of the data."""

from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.data_range import bounds
from keras_gradtools.attacks.perturbed_input import OfOneInput, called, constant_weights, output_activation
from keras_gradtools.transforms import compiled


def input_gradients(model, objective, x, y):
    """The gradient of the objective of each example by the example, a constant, the objective, and how bad each is."""
    x = backend.alias(x)
    scope = constant_weights(model)
    with scope, scope:
        record = backend.Tape(watch_accessed_variables=False)
        with record, record:
            record.watch(x)
            values, badness = objective(y, called(model, x), output_activation(model))
        (gradients,) = backend.constant_pullback(record, [values], [x], [ops.ones_like(values)])
    if gradients is None:
        raise ValueError(
            "An attack needs outputs that depend differentiably on the input. Received: a model without a gradient by "
            f"its input of dtype {validation.dtype_of(x)} and shape {tuple(x.shape)}."
        )
    return gradients, values, badness


def ascend(model, objective, norm, moved, x, y, epsilon, step_size, low, high):
    """One step up from `moved`: where it leads, and how bad it was before."""
    gradients, _, badness = input_gradients(model, objective, moved, y)
    step = norm_balls.for_each(step_size, x) * ops.cast(norm_balls.steepest(gradients, norm), x.dtype)
    further = x + norm_balls.projected(moved + step - x, epsilon, norm)
    # Where x is in the range, going back into it leads no further away from x.
    return ops.clip(further, low, high), badness


def look(model, objective, norm, moved, y, best, worst):
    """The worse of the examples known and of those at hand, and how bad these are."""
    return _worse(measure_badness(model, objective, norm, moved, y), moved, best, worst)


def measure_gradients(model, objective, norm, x, y):
    """The l2 norm of each gradient, whatever the attack's, and how bad each example is."""
    gradients, _, badness = input_gradients(model, objective, x, y)
    return norm_balls.lengths(ops.cast(gradients, badness.dtype), 2), badness


def measure_slopes(model, objective, norm, x, y):
    """The objective, the dual norm of its gradient, and the perturbation of length 1 that goes up fastest."""
    gradients, values, _ = input_gradients(model, objective, x, y)
    gradients = ops.cast(gradients, values.dtype)
    return values, norm_balls.dual_lengths(gradients, norm), norm_balls.steepest(gradients, norm)


def measure_badness(model, objective, norm, x, y):
    """How bad each example is."""
    scope = constant_weights(model)
    with scope, scope:
        return objective(y, called(model, x), output_activation(model))[1]


def ascend_and_look(model, objective, norm, moved, x, y, best, worst, *options):
    """`ascend`, and what `look` finds where it began."""
    further, badness = ascend(model, objective, norm, moved, x, y, *options)
    return (further, *_worse(badness, moved, best, worst))


def just_ascend(model, objective, norm, *args):
    """Where `ascend` leads."""
    return ascend(model, objective, norm, *args)[0]


def _worse(badness, moved, best, worst):
    badness = ops.cast(badness, worst.dtype)
    is_worse = badness > worst
    return ops.where(norm_balls.for_each(is_worse, moved), moved, best), ops.where(is_worse, badness, worst)


class CompiledAscent:
    """Ascents on one model, in programs that are compiled once for each objective, norm and shape.

    `examples`, an `Examples`, says which of the model's inputs is moved; `carry` what the others are.
    """

    def __init__(self, model, norm, clip, examples=None):
        self._model, self._norm, self._clip = model, norm, clip
        self._chosen = None if examples is None else examples.chosen
        self._programs, self._inputs = {}, None

    def carry(self, inputs):
        """Has what follows be of these inputs, in tensors; what stands for the one that is moved does not matter."""
        self._inputs = inputs

    def step(self, objective, x, y, epsilon):
        """The end of one step of length `epsilon` from `x`."""
        return self._run(just_ascend, objective, x, x, y, epsilon, epsilon, *bounds(self._clip, x.dtype))

    def gradient_lengths(self, objective, x, y):
        """The l2 norm of each gradient, and how bad each example is."""
        return self._run(measure_gradients, objective, x, y)

    def slopes(self, objective, x, y):
        """The objective, the dual norm of its gradient, and the perturbation of length 1 that goes up fastest."""
        return self._run(measure_slopes, objective, x, y)

    def badness(self, objective, x, y):
        """How bad each example is."""
        return self._run(measure_badness, objective, x, y)

    def worst(self, runs, x, y, epsilon, steps, rate):
        """The worst examples on the way of several runs, and how bad they are; `x` itself is among them.

        `runs` are pairs of an objective and of perturbations to begin with; a step is `rate * epsilon` long.
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

            # What is compiled is kept with the model: the body must not hold it.
            options = (part, objective, norm, chosen)
            program = compiled.prepare("attack", self._model, body, options, (self._inputs, *args), {})
            self._programs[part, objective] = program
        return program((self._inputs, *args), {})[0]
