"""The verdict on one layer's second derivative, and the report on all layers of a model."""

import dataclasses
import re

from keras_gradtools.display.html import Table
from keras_gradtools.display.results import displayed
from keras_gradtools.keras_state import layer_calls

VERDICTS = {
    "yes": "twice differentiable",
    "zero": "all its second derivatives are zero",
    "once": "differentiable once, but not twice",
    "wrong": "its second derivative is not the derivative of its gradient",
    "no": "not differentiable",
    "unclear": "undecided",
    "constant": "nothing to differentiate",
}
# The advice for errors that contain these words. The first match counts.
_ADVICE = (
    ("cudnn", "Create it with `use_cudnn=False`, or run it on the CPU."),
    ("flash", "Create it with `flash_attention=False`, or call it only inside a tape or transform of keras_gradtools."),
    (
        "once_differentiable",
        "Write its gradient with `keras_gradtools.custom_gradient`, which can be differentiated again.",
    ),
    (
        "custom_gradient",
        "Write its gradient with `keras_gradtools.custom_gradient`, which can be differentiated again.",
    ),
    ("xla", "Compile with `jit_compile=False`."),
)
_ADVICE_BY_VERDICT = {
    "once": "Replace it, or use a penalty with `method='finite_difference'`, which needs no second derivative.",
    "wrong": "If it has a custom gradient, write that with `keras_gradtools.custom_gradient`, so that it can be "
    "differentiated again. Otherwise, look for a `stop_gradient` in it.",
    "no": "Exclude it from differentiation: freeze it, or apply `stop_gradient` to its outputs.",
    "unclear": "Try it on other examples `x`, or on smaller ones.",
}
_LONGEST_MESSAGE = 300
_MOST_NAMES = 5
# The text that Keras adds around the message of an error inside a layer.
_AROUND = re.compile(r"Exception encountered when calling [^\n]*\n+(.*?)(?:\n+Arguments received by .*)?", re.DOTALL)
_EMPHASIS = re.compile(r"\x1b\[[0-9;]*m")


@displayed
@dataclasses.dataclass(frozen=True)
class LayerVerdict:
    """The verdict on one layer.

    Attributes:
        path: The path of the layer in the model.
        layer_class: The name of its class, with the module.
        verdict: `"yes"`: it can be differentiated twice. `"zero"`: all its second derivatives are zero, because it is
            piecewise linear, as ReLU and max pooling are. `"once"`: it has a gradient, but no second derivative.
            `"wrong"`: its second derivative is not the derivative of its gradient. `"no"`: it has no gradient.
            `"unclear"`: the differences of its gradient do not converge, as at a kink or if it branches on its values.
            `"constant"`: it has no floating-point input or weight, or its outputs do not depend on them.
        message: The error of the backend, the size of the error in the derivative, or why the verdict is unclear. Empty
            for `"yes"`, `"zero"` and `"constant"`.
        advice: What to do about it. Empty if there is nothing to do.
        zero_by_inputs: Whether all second derivatives with respect to its inputs are zero, because it is piecewise
            linear in them. This is also true of a Dense layer with ReLU, whose mixed derivatives with respect to inputs
            and weights are not zero.
    """

    path: str
    layer_class: str
    verdict: str
    message: str = ""
    advice: str = ""
    zero_by_inputs: bool = False

    def __str__(self) -> str:
        text = f"{self.path} ({self.layer_class}): {VERDICTS[self.verdict]}"
        details = " ".join(part for part in (self.message, self.advice) if part)
        return f"{text}. {details}" if details else text


@displayed
@dataclasses.dataclass(frozen=True)
class LayerDerivatives:
    """The result of `layer_derivatives`.

    Printed, it is a summary, one line for each layer that has a problem or is unclear, and one line that names the
    layers that are piecewise linear.

    Attributes:
        model: The name of the model.
        backend: The backend that it was tried on.
        layers: A tuple with a `LayerVerdict` for each layer, in the order of the calls.
        note: The assumptions about the examples. Empty if there are none.
    """

    model: str
    backend: str
    layers: tuple[LayerVerdict, ...]
    note: str = ""

    @property
    def twice_differentiable(self) -> bool:
        """Whether no layer has a missing or wrong second derivative. Layers in `unclear` do not count."""
        return not self.problems

    @property
    def problems(self) -> tuple[LayerVerdict, ...]:
        """The verdicts of the layers whose second derivative is missing or wrong."""
        return tuple(layer for layer in self.layers if layer.verdict not in ("yes", "zero", "constant", "unclear"))

    @property
    def unclear(self) -> tuple[LayerVerdict, ...]:
        """The verdicts of the layers for which the test is undecided."""
        return tuple(layer for layer in self.layers if layer.verdict == "unclear")

    @property
    def zero(self) -> tuple[LayerVerdict, ...]:
        """The verdicts of the layers whose second derivatives with respect to their inputs are all zero."""
        return tuple(layer for layer in self.layers if layer.zero_by_inputs)

    def _on_zeros(self):
        if not self.zero:
            return ""
        names = ", ".join(layer.path for layer in self.zero[:_MOST_NAMES])
        others = f" and {len(self.zero) - _MOST_NAMES} more" if len(self.zero) > _MOST_NAMES else ""
        return (
            "These layers have kinks (ReLU, max pooling), and with respect to their inputs all second derivatives are "
            f"zero: {names}{others}. If every other layer is linear in its inputs, the Laplacian of the model and its "
            "Hessian with respect to the inputs are zero, too. Then use a smooth activation, such as tanh, GELU, SiLU "
            "or softplus."
        )

    def _parts(self):
        summary, *_ = str(self).splitlines()
        found = [
            (v.path, v.layer_class, VERDICTS[v.verdict], v.message, v.advice) for v in self.problems + self.unclear
        ]
        table = [Table(found, ("layer", "class", "verdict", "message", "advice"))] if found else []
        return [summary.removesuffix(":"), *table, *filter(None, [self._on_zeros()]), self.note]

    def __str__(self) -> str:
        what = f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'} of {self.model!r} on {self.backend}"
        if not self.problems and not self.unclear:
            findings = ["none has a wrong or missing second derivative."]
            if not self.zero:
                findings = ["all of them can be differentiated twice."]
        else:
            findings = [f"{len(self.problems)} cannot be differentiated twice."] if self.problems else []
            findings += [f"{len(self.unclear)} could not be decided."] if self.unclear else []
        lines = [f"{what}: {' '.join(findings)}", *map(str, self.problems), *map(str, self.unclear)]
        lines += filter(None, [self._on_zeros()])
        return "\n- ".join(lines) + (f"\n{self.note}" if self.note else "")


def verdict_on(layer, verdict, message=""):
    """The verdict on a layer, with the advice for it."""
    advice = _ADVICE_BY_VERDICT.get(verdict, "")
    return LayerVerdict(layer_calls.path_of(layer), layer_calls.class_path(layer), verdict, message, advice)


def failed(layer, verdict, error):
    """The verdict on a layer whose derivative raises `error`."""
    everything = str(error).lower()
    advice = next((text for word, text in _ADVICE if word in everything), _ADVICE_BY_VERDICT[verdict])
    return dataclasses.replace(verdict_on(layer, verdict, f"{cause_of(error)}."), advice=advice)


def cause_of(error):
    """The type of an error and the first line of its message, without the text that Keras adds around it."""
    message = _EMPHASIS.sub("", str(error)).strip()
    while around := _AROUND.fullmatch(message):
        message = around[1].strip()
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:_LONGEST_MESSAGE].rstrip(".: ")
