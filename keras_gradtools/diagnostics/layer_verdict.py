"""What is said about a layer whose second derivative was tried, and about a model of such layers."""

import dataclasses
import re

from keras_gradtools.backend import layer_calls

VERDICTS = {
    "yes": "twice differentiable",
    "once": "differentiable once, and not twice",
    "wrong": "a second derivative that is not that of its gradient",
    "no": "no gradient at all",
    "unclear": "cannot tell",
    "constant": "nothing to differentiate",
}
# What is done about it, by what the error says; the first that fits.
_ADVICE = (
    ("cudnn", "Make it with `use_cudnn=False`, or call it on the processor."),
    ("flash", "Make it with `flash_attention=False`, or call it inside a tape or transform of keras_gradtools alone."),
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
    "once": "Replace it. A penalty with `method='finite_difference'` takes no second derivative of it.",
    "wrong": "If it has a gradient of its own, write that with `keras_gradtools.custom_gradient` so that it can be "
    "differentiated; look for a `stop_gradient` in it.",
    "no": "Leave it out of what is differentiated: freeze it, or put a `stop_gradient` behind it.",
    "unclear": "Try it on other examples `x`, or on smaller ones.",
}
_LONGEST_MESSAGE = 300
# What Keras puts around the message of an error inside a layer.
_AROUND = re.compile(r"Exception encountered when calling [^\n]*\n+(.*?)(?:\n+Arguments received by .*)?", re.DOTALL)
_EMPHASIS = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True)
class LayerVerdict:
    """What was found about one layer.

    Attributes:
        path: the layer's path in the model.
        layer_class: its class.
        verdict: one of `"yes"`, `"once"`, `"wrong"`, `"no"`, `"unclear"` (the differences that it was compared with
            do not converge, as at a kink or where it decides by its values) and `"constant"` (no floating-point input
            or weight, or outputs that do not depend on them).
        message: what the backend said, by how much the derivative is off, or why it is unclear; empty where it is
            right.
        advice: what to do about it; empty where nothing has to be done.
    """

    path: str
    layer_class: str
    verdict: str
    message: str = ""
    advice: str = ""

    def __str__(self):
        text = f"{self.path} ({self.layer_class}): {VERDICTS[self.verdict]}"
        details = " ".join(part for part in (self.message, self.advice) if part)
        return f"{text}. {details}" if details else text


@dataclasses.dataclass(frozen=True)
class PreflightReport:
    """What `preflight` found; printed, a sentence and one line for each layer that is not right.

    Attributes:
        model: the name of the model.
        backend: the backend that it was tried on.
        layers: a `LayerVerdict` for each layer, in the order in which they are called.
        note: what was assumed about the examples; empty where nothing was.
    """

    model: str
    backend: str
    layers: tuple
    note: str = ""

    @property
    def twice_differentiable(self):
        """Whether no layer was found to lack a second derivative; see `unclear`, too."""
        return not self.problems

    @property
    def problems(self):
        """The verdicts of the layers that have none."""
        return tuple(layer for layer in self.layers if layer.verdict not in ("yes", "constant", "unclear"))

    @property
    def unclear(self):
        """The verdicts of the layers of which it cannot be told."""
        return tuple(layer for layer in self.layers if layer.verdict == "unclear")

    def __str__(self):
        what = f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'} of {self.model!r} on {self.backend}"
        if not self.problems and not self.unclear:
            findings = ["all of them can be differentiated twice."]
        else:
            findings = [f"{len(self.problems)} cannot be differentiated twice."] if self.problems else []
            findings += [f"of {len(self.unclear)} it cannot be told."] if self.unclear else []
        lines = [f"{what}: {' '.join(findings)}", *map(str, self.problems), *map(str, self.unclear)]
        return "\n- ".join(lines) + (f"\n{self.note}" if self.note else "")


def verdict_on(layer, verdict, message=""):
    """The verdict on a layer, with the advice that belongs to it."""
    advice = _ADVICE_BY_VERDICT.get(verdict, "")
    return LayerVerdict(layer_calls.path_of(layer), layer_calls.class_path(layer), verdict, message, advice)


def failed(layer, verdict, error):
    """The verdict on a layer whose derivative raises `error`."""
    everything = str(error).lower()
    advice = next((text for word, text in _ADVICE if word in everything), _ADVICE_BY_VERDICT[verdict])
    return dataclasses.replace(verdict_on(layer, verdict, f"{cause_of(error)}."), advice=advice)


def cause_of(error):
    """The type of an error and the first line of what the framework said, without what Keras says around it."""
    message = _EMPHASIS.sub("", str(error)).strip()
    while around := _AROUND.fullmatch(message):
        message = around[1].strip()
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:_LONGEST_MESSAGE].rstrip(".: ")
