"""The input gradient penalty: its options, and its value for a recorded call."""

import math
import typing
import warnings

import keras
from keras import ops

from keras_gradtools import chosen_inputs, example_norms, validation
from keras_gradtools.input_gradients import smoothness
from keras_gradtools.input_gradients.targets import ALL
from keras_gradtools.keras_state import layer_state
from keras_gradtools.tape import vectors

METHODS = ("auto", "exact", "finite_difference", "random_projection")
_EMBEDDINGS = (
    "If they are indices, penalize the output of the embedding: wrap the part of the model that comes after it, and "
    "train that on embedded data, or put that part into a `keras_gradtools.layers.InputGradientPenalty`."
)


class Penalties(typing.NamedTuple):
    """The penalty of each example, and the norm of its gradient as a constant, both of shape `(batch,)`."""

    values: typing.Any
    norms: typing.Any


class Choice(typing.NamedTuple):
    """The chosen method, its number of projections, and the reasons for the choice."""

    method: str
    projections: int
    reasons: tuple


class Penalty:
    """The checked options of a penalty.

    `owner` is the name of the public class or function, for error messages. It documents the other arguments.
    """

    def __init__(
        self,
        owner,
        target="loss",
        norm=2,
        squared=True,
        center=0.0,
        method="auto",
        step_size=0.1,
        projections=1,
        frozen_statistics=False,
    ):
        self.owner = owner
        self.target = self._require_target(target)
        self.norm = self._require_norm(norm)
        self.squared = validation.require_flag(owner, "squared", squared)
        self.center = validation.require_number(owner, "center", center)
        self.method = self._require_method(method)
        self.step_size = validation.require_number(owner, "step_size", step_size, above=0)
        self.projections = self._require_projections(projections)
        self.frozen_statistics = validation.require_flag(owner, "frozen_statistics", frozen_statistics)

    @property
    def is_plain_square(self):
        """Whether the penalty is the squared l2 norm, which needs no root and has unbiased projections."""
        return self.norm == 2 and self.squared and not self.center

    @property
    def may_draw(self):
        """Whether a method that may be chosen draws random numbers."""
        return self.target == "outputs" and self.method != "exact" and self.projections != ALL

    def choose(self, model):
        """The `Choice` of a method for `model`."""
        projections = ALL if self.method == "exact" else self.projections
        if self.method != "auto":
            return Choice(self.method, projections, ())
        reasons = smoothness.reasons_against_exact(model)
        if not reasons:
            return Choice("exact", ALL, ("no kinks were found",))
        return Choice("finite_difference", self.projections if self.is_plain_square else ALL, reasons)

    def calls_again(self, choice):
        """Whether the model is called more than once, so that a `Snapshot` is needed."""
        return choice.method == "finite_difference" or self.frozen_statistics

    def measure(self, choice, call, target, model, training):
        """The `Penalties` of a `RecordedCall` of `model`."""
        if self.frozen_statistics and training:
            block = layer_state.frozen_statistics(model)
            with block, block:
                return self._measure(choice, call.recorded_again(), target.recomputed())
        return self._measure(choice, call, target)

    def _measure(self, choice, call, target):
        if choice.method == "finite_difference":
            return self._finite_differences(call, target)
        g = example_norms.flattened(self._connected(call, target.gradients(call)))
        return Penalties(self._of_gradients(g), example_norms.norms(ops.stop_gradient(g), self.norm))

    def _finite_differences(self, call, target):
        quotients, part_norms = [], []
        for part in target.parts():
            values = part.recorded(call)
            gradients = call.constant_vjp([values], [ops.ones_like(values)])
            self._connected(call, gradients)
            pairs = zip(gradients, call.sources, strict=True)
            g = example_norms.flattened([vectors.zeros(x) if u is None else u for u, x in pairs])
            norms, directions = example_norms.norms_and_directions(g, self.norm)
            further = part.each(call.again(self._shifted(call.sources, directions)))
            difference = example_norms.at_least_single(further) - example_norms.at_least_single(values)
            # Where nothing was shifted, the two values may still be rounded differently.
            quotients.append(ops.where(norms > 0, difference / self.step_size, 0.0))
            part_norms.append(norms)
        if len(quotients) == 1:
            return Penalties(self._from_center(quotients[0]), part_norms[0])
        norms = example_norms.norms(ops.stack(part_norms, axis=1), self.norm)
        return Penalties(self._of_gradients(ops.stack(quotients, axis=1)), norms)

    def _connected(self, call, gradients):
        connected = [g for g in gradients if g is not None]
        if not connected:
            raise chosen_inputs.no_gradient(
                self.owner,
                "inputs that the target does not depend on differentiably",
                call.sources,
                _EMBEDDINGS,
            )
        return connected

    def _shifted(self, sources, directions):
        """The sources, with each example moved by `step_size` along its direction."""
        steps = self.step_size * directions
        shifted, start = [], 0
        for x in sources:
            step = steps if len(sources) == 1 else steps[:, start : start + math.prod(x.shape[1:])]
            shifted.append(x + ops.cast(ops.reshape(step, ops.shape(x)), x.dtype))
            start += math.prod(x.shape[1:]) if len(sources) > 1 else 0
        return shifted

    def _of_gradients(self, g):
        if self.is_plain_square:
            return ops.sum(ops.square(g), axis=1)
        return self._from_center(example_norms.norms(g, self.norm))

    def _from_center(self, norms):
        distance = norms - self.center if self.center else norms
        return ops.square(distance) if self.squared else example_norms.magnitude(distance)

    def get_config(self):
        target = self.target
        return {
            "target": target if isinstance(target, str) else keras.saving.serialize_keras_object(target),
            "norm": self.norm,
            "squared": self.squared,
            "center": self.center,
            "method": self.method,
            "step_size": self.step_size,
            "projections": self.projections,
            "frozen_statistics": self.frozen_statistics,
        }

    def describe(self, choice):
        """One line that says what is computed, how, and why."""
        how = choice.method
        if how == "finite_difference":
            how += f" (step_size={self.step_size:g})"
        if self.target == "outputs" and choice.projections != ALL:
            how += f" (projections={choice.projections})"
        what = f"norm {self.norm}" + (f" around {self.center:g}" if self.center else "")
        target = self.target if isinstance(self.target, str) else validation.name_of(self.target)
        why = f", because {'; '.join(choice.reasons)}" if choice.reasons else ""
        return f"{how} of {target!r}, {what}{', squared' if self.squared else ''}{why}"

    def warn_of_rounding(self, dtype):
        """Warns if the step of finite differences is lost in rounding."""
        if self.method in ("finite_difference", "auto") and self.step_size < 1e-2 and dtype in ("float16", "bfloat16"):
            warnings.warn(
                f"{self.owner} with step_size={self.step_size:g} in {dtype}: finite differences over a step this small "
                "are mostly rounding noise. Use 0.01 or more, or method='exact'.",
                stacklevel=3,
            )

    def _require_target(self, target):
        if target in ("loss", "outputs") if isinstance(target, str) else callable(target):
            return target
        raise self._refused(
            "target",
            "'loss', 'outputs' or a function",
            target,
            "A function takes (y, y_pred) and returns one number for each example.",
        )

    def _require_norm(self, norm):
        if validation.is_one_of(norm, ("inf", math.inf)):
            return "inf"
        if validation.is_one_of(norm, (1, 2)):
            return int(norm)
        raise self._refused(
            "norm", "1, 2 or 'inf'", norm, "It is the norm of the gradient: 1 defends against l-infinity attacks."
        )

    def _require_method(self, method):
        validation.require_choice(self.owner, "method", method, METHODS)
        if method == "random_projection" and self.target != "outputs":
            raise self._refused(
                "method",
                "'auto', 'exact' or 'finite_difference' if `target` is not 'outputs'",
                method,
                "Random projections apply to several outputs. This target has one number for each example.",
            )
        return method

    def _require_projections(self, projections):
        if not validation.is_count(projections) and not validation.is_one_of(projections, (ALL,)):
            raise self._refused("projections", f"a positive integer, or {ALL} for all outputs,", projections)
        is_estimate = self.target == "outputs" and self.method in ("random_projection", "finite_difference")
        if is_estimate and projections != ALL and not self.is_plain_square:
            raise self._refused(
                "projections",
                f"{ALL} with norm={self.norm!r}, squared={self.squared}, center={self.center}",
                projections,
                "Random projections estimate only the squared l2 norm without bias.",
            )
        return int(projections)

    def _refused(self, name, expected, received, advice=""):
        return validation.refused(self.owner, expected, name, received, advice)


def restored(config, names, custom_objects):
    """The config, with the entries `names` deserialized if they were saved as objects."""
    return config | {
        name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        for name in names
        if isinstance(config[name], dict)
    }


def chosen_positions(owner, model, inputs, names):
    """The positions of the inputs to differentiate with respect to, among the flattened `inputs`."""
    return chosen_inputs.choose(owner, model, inputs, names, _EMBEDDINGS).positions
