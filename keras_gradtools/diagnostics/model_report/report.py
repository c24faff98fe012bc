"""The report on a model: its checks one after another, and the findings."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import keras

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Data, Loss, Verbose
from keras_gradtools.diagnostics.layer_verdict import cause_of
from keras_gradtools.diagnostics.model_report import checks, page
from keras_gradtools.diagnostics.model_report.findings import SEVERITIES, Finding, findings_of
from keras_gradtools.diagnostics.model_report.sections import FAILED, NOT_RUN, Section
from keras_gradtools.diagnostics.model_report.subject import NAME, NotApplicable, Subject
from keras_gradtools.display import html
from keras_gradtools.display.progress import Progress

# In this order: name, title, what it does, and the function.
CHECKS = (
    ("values", "Values", "Calls the model, and looks for NaN and infinity.", checks.check_values),
    (
        "layers",
        "Second derivatives",
        "Compares the second derivative of each layer with differences of its gradient.",
        checks.check_layers,
    ),
    (
        "independence",
        "Independence of the examples",
        "Tests whether the outputs of an example depend on the inputs of other examples.",
        checks.check_independence,
    ),
    (
        "jacobian",
        "Jacobian",
        "Computes the singular values of the Jacobian of the outputs with respect to the inputs, for each example.",
        checks.check_jacobian,
    ),
    (
        "gradients",
        "Gradient flow",
        "Computes the gradient of the loss by layer, units that are always zero, and the noise of the gradient.",
        checks.check_gradients,
    ),
    ("curvature", "Curvature", "Estimates the spectrum of the Hessian of the loss.", checks.check_curvature),
    (
        "robustness",
        "Robustness",
        "Attacks the classifier, and estimates how far each example is from a misclassification.",
        checks.check_robustness,
    ),
)
NAMES = tuple(name for name, *_ in CHECKS)


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The result of `kg.diagnostics.report`. `print` shows the findings, and a notebook shows them as a table.

    Attributes:
        model: The name of the model.
        facts: A dict of what the report is about: the numbers of weights and examples, the backend and the versions.
        findings: A tuple of `Finding`s, the most severe first.
        sections: A tuple with a section for each check, in order, with `title`, `status`, `remark` and `measured`.
    """

    model: str
    facts: dict
    findings: tuple[Finding, ...]
    sections: tuple[Section, ...]

    @property
    def summary(self) -> str:
        """The numbers of findings and of checks, in a sentence."""
        counts = [(sum(f.severity == severity for f in self.findings), severity) for severity in SEVERITIES]
        found = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for count, severity in counts if count)
        done = sum(section.status == "done" for section in self.sections)
        return f"{self.model!r}: {found or 'nothing was found'}, in {done} of {len(self.sections)} checks."

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file, which contains its pictures."""
        if not isinstance(path, (str, os.PathLike)):
            raise validation.refused("Report.save", "a path", "path", path)
        pathlib.Path(path).write_text(page.page_of(self), encoding="utf-8")

    def __str__(self):
        left = [f"- {s.title} was {s.status}: {s.remark}" for s in self.sections if s.status == NOT_RUN]
        left += [f"- {s.title} {s.status}: {s.remark}" for s in self.sections if s.status == FAILED]
        return "\n".join([self.summary, *(f"- {finding}" for finding in self.findings), *left])

    def __repr__(self):
        return f"<Report on {self.summary}>"

    def _repr_html_(self):
        rows = [(f.severity, f.title, f.evidence, f.advice) for f in self.findings]
        table = [html.Table(rows, ("severity", "finding", "measured", "what to do"))] if rows else []
        width = 3 if any(s.remark for s in self.sections) else 2
        done = [(s.title, s.status, s.remark)[:width] for s in self.sections]
        return html.fragment("Report", [self.summary, *table, html.Table(done, ("check", "status", "reason")[:width])])


def report(
    model: Any,
    data: Data,
    loss: Loss = None,
    *,
    examples: int = 64,
    checks: str | Sequence[str] | None = None,
    clip: tuple[float, float] | None = None,
    max_seconds: float = 300.0,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> "Report":
    r"""Examines a model on a batch of data, and reports what is wrong with its derivatives and what to do.

    The checks are `"values"` (NaN and infinity), `"layers"` (second derivatives of each layer), `"independence"` (of
    the examples), `"jacobian"` (its singular values), `"gradients"` (of each layer, dead units, noise), `"curvature"`
    (the spectrum of the Hessian) and `"robustness"` (attacks, for classifiers). If a check has no meaning for the
    model, or fails, the report says why, and the other checks run. The thresholds of the findings are in
    docs/report.md.

    Args:
        model: A built Keras model. For a wrapper of `kg.models`, the wrapped model is examined.
        data: `(x, y)`, `(x, y, sample_weight)`, or `x` alone for the checks without a loss: arrays or tensors of shape
            `(batch, ...)`. `x` and `y` may be nested structures.
        loss: A loss as `compile` takes it. Default: the compiled loss.
        examples: The largest number of examples. If there are more, some are drawn at random.
        checks: The names of the checks in a list. Default: all.
        clip: The range of the inputs, `(smallest, largest)`, within which attacks stay. Default: `(0.0, 1.0)` if the
            inputs are in that range and reach above 0.5, otherwise no range.
        max_seconds: After this time, no further check begins. The check that is running ends first.
        seed: An integer that seeds the random numbers.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if it takes long.

    Returns:
        A `Report` with the attributes `findings` and `sections`. `save("report.html")` writes a page with pictures,
        which needs `pip install "keras-gradtools[report]"`.

    Raises:
        ValueError: If the model is not built, the data do not fit it, data or weights contain NaN or infinity, or an
            option is invalid.

    Cost:
        About a hundred products with the Hessian, two thousand gradients for the attack on 32 examples, and those of
        the other checks. The model is not changed.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, "relu", name="hidden")])
    >>> model.compile("sgd", "mse")
    >>> model.set_weights([np.array([[1.0, 1.0]]), np.array([-9.0, -9.0])])
    >>> x = np.array([[1.0], [2.0]], "float32")
    >>> found = kg.diagnostics.report(model, (x, x * np.ones(2)), checks=["gradients"])
    >>> [(finding.severity, finding.name) for finding in found.findings]
    [('error', 'zero_gradient'), ('error', 'mostly_dead')]

    Source: As for the functions in `kg.diagnostics`, `kg.curvature` and `kg.attacks`.
    """
    chosen = _require_checks(checks)
    validation.require_verbose(NAME, verbose)
    limit = validation.require_number(NAME, "max_seconds", max_seconds, above=0)
    subject = Subject(model, data, loss, examples, seed, _require_clip(clip))
    begun, sections = time.monotonic(), []
    with Progress(len(chosen), f"{NAME} on {subject.model.name!r}", verbose, "check") as progress:
        for name, title, about, check in chosen:
            section = Section(name, title, about)
            sections.append(section)
            progress.note(title)
            if time.monotonic() - begun > limit:
                section.status, section.remark = NOT_RUN, f"the limit of {limit:g} seconds was reached."
            else:
                _run(check, subject, section)
            progress.update()
        progress.note("")
    return Report(subject.model.name, _facts(subject), tuple(findings_of(sections)), tuple(sections))


def _run(check, subject, section):
    begun = time.monotonic()
    try:
        check(subject, section)
    except NotApplicable as reason:
        section.status, section.remark = NOT_RUN, str(reason)
    except Exception as error:  # the other checks go on
        section.status, section.remark = FAILED, f"{cause_of(error)}."
    section.seconds = time.monotonic() - begun


def _facts(subject):
    model = subject.model
    of = "" if subject.count == subject.given_count else f" of {subject.given_count}, drawn at random"
    return {
        "model": f"{model.name} ({type(model).__name__}), {len(model.layers)} layers, {model.count_params():,} weights",
        "examples": f"{subject.count}{of}",
        "backend": f"{backend.name()}, Keras {keras.__version__}",
    }


def _require_checks(names):
    if names is None:
        return CHECKS
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not given or not all(name in NAMES for name in given):
        raise validation.refused(NAME, f"a list of names out of {', '.join(map(repr, NAMES))}", "checks", names)
    return tuple(check for check in CHECKS if check[0] in given)


def _require_clip(clip):
    if clip is None:
        return None
    is_pair = isinstance(clip, (list, tuple)) and len(clip) == 2 and all(map(validation.is_number, clip))
    if not is_pair or not clip[0] < clip[1]:
        raise validation.refused(NAME, "(smallest, largest), or None,", "clip", clip)
    return float(clip[0]), float(clip[1])
