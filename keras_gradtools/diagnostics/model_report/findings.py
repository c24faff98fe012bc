"""The rules that turn the measurements of a report into findings: what is wrong, why it matters, and what to do."""

import dataclasses
from collections.abc import Callable

from keras_gradtools.diagnostics.model_report import evidence

SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a report has found.

    Attributes:
        name: The name of the rule.
        severity: `"error"`, if results are wrong or training cannot work; `"warning"`, if it is likely to be a problem;
            `"note"`, if it is good to know.
        title: What is wrong, in a sentence.
        evidence: What was measured.
        threshold: When the rule holds.
        reason: Why it matters.
        advice: What to do.
        section: The name of the section with the measurements.
    """

    name: str
    severity: str
    title: str
    evidence: str
    threshold: str
    reason: str
    advice: str
    section: str

    def __str__(self):
        return f"{self.severity}: {self.title} {self.evidence} {self.advice}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule. `holds(measured)` returns the evidence, or None if there is nothing to report."""

    name: str
    severity: str
    section: str
    title: str
    threshold: str
    reason: str
    advice: str
    holds: Callable[[dict], str | None]

    def finding(self, measured):
        """The `Finding`, or None."""
        evidence = self.holds(measured)
        if evidence is None:
            return None
        texts = self.title, evidence, self.threshold, self.reason, self.advice
        return Finding(self.name, self.severity, *texts, self.section)


def findings_of(sections):
    """The findings of all sections, the most severe first, and then in the order of the sections."""
    found = [rule.finding(section.measured) for section in sections for rule in RULES if rule.section == section.name]
    return sorted((one for one in found if one is not None), key=lambda one: SEVERITIES.index(one.severity))


# The rules: name, severity, section, title, threshold, reason, advice, evidence. docs/report.md lists them.
RULES = (
    Rule(
        "not_finite_outputs", "error", "values", "The model returns NaN or infinity.", "any value is not finite",
        "Every loss and every gradient of these examples is NaN.",
        "Look for an overflow: scale the inputs, add normalization, or compute logits instead of probabilities. "
        "In half precision, use a loss scale or bfloat16.",
        evidence.not_finite_outputs,
    ),
    Rule(
        "not_finite_loss", "error", "values", "The loss is not finite.", "the loss is NaN or infinite",
        "The outputs are finite, so the loss itself overflows: log(0), a division by zero, or labels out of range.",
        "Compute the loss from logits (from_logits=True), and check the labels.",
        evidence.not_finite_loss,
    ),
    Rule(
        "not_finite_gradient", "error", "gradients", "The gradient is not finite.", "any element is NaN or infinite",
        "One such step makes all weights NaN.",
        "Look for sqrt, log, norm or division at zero in these layers, and for an overflow. "
        "Clipping does not help against NaN.",
        evidence.not_finite_gradient,
    ),
    Rule(
        "zero_gradient", "error", "gradients", "Layers receive no gradient.", "the gradient of a layer is exactly zero",
        "These weights do not train.",
        "Look for a stop_gradient, rounding or argmax, for a part of the model that the loss does not use, and for "
        "dead or saturated units after these layers.",
        evidence.zero_gradient,
    ),
    Rule(
        "vanishing_gradient", "error", "gradients", "Gradients vanish on the way to the first layer.",
        f"first layer / last layer below {evidence.FEW_GRADIENT:g}, of the root mean square of the elements",
        "The first layers learn far more slowly than the last ones, if at all.",
        "Replace sigmoid or tanh by ReLU or GELU, use He or Glorot initialization, and add normalization or residual "
        "connections.",
        evidence.vanishing_gradient,
    ),
    Rule(
        "exploding_gradient", "error", "gradients", "Gradients explode on the way to the first layer.",
        f"first layer / last layer above {evidence.MANY_GRADIENT:g}, of the root mean square of the elements",
        "A learning rate that suits the last layers makes the first ones diverge.",
        "Use a smaller initialization, normalization or residual connections, or clip gradients "
        "(kg.layers.ClipGradientNorm, clipnorm of the optimizer).",
        evidence.exploding_gradient,
    ),
    Rule(
        "mostly_dead", "error", "gradients", "Most units of a layer are dead.",
        f"more than {evidence.MOST_DEAD:.0%} of a layer",
        "A unit that is zero on all examples passes no gradient and does not recover.",
        "Lower the learning rate, use He initialization, or use LeakyReLU or GELU.",
        evidence.mostly_dead,
    ),
    Rule(
        "some_dead", "warning", "gradients", "Some units are dead.", f"more than {evidence.SOME_DEAD:.0%} of a layer",
        "These units take part in neither the outputs nor the training. With few examples, live units may look dead.",
        "Check with more examples. If they stay dead, lower the learning rate or use LeakyReLU or GELU.",
        evidence.some_dead,
    ),
    Rule(
        "noisy_gradient", "note", "gradients", "The gradient is mostly noise.",
        f"a noise scale above {evidence.LARGE_NOISE} examples, from {evidence.LEAST_EXAMPLES} examples or more",
        "The gradients of single examples point in very different directions, as they do near the end of training.",
        "If training has stalled, use larger batches or lower the learning rate.",
        evidence.noisy_gradient,
    ),
    Rule(
        "not_twice", "warning", "layers", "Layers have no correct second derivative.", "a layer fails the test",
        "Penalties on input gradients, Hessians and Newton steps are wrong or raise an error.",
        "Follow the advice for each layer, or use a penalty with method='finite_difference'.",
        evidence.not_twice,
    ),
    Rule(
        "undecided_layers", "note", "layers", "Some layers could not be tested.", "the differences do not converge",
        "The layer has a kink at these examples, or branches on its values.", "Try other examples.",
        evidence.undecided_layers,
    ),
    Rule(
        "mixed_in_inference", "error", "independence", "Examples depend on one another, also in inference mode.",
        "gradients between examples above rounding",
        "A prediction depends on the other examples in its batch. Batch Jacobians, per-example gradients and attacks "
        "are wrong.",
        "Remove what mixes the examples, or call the model on one example at a time.",
        evidence.mixed_in_inference,
    ),
    Rule(
        "mixed_in_training", "note", "independence", "Examples depend on one another in training mode.",
        "gradients between examples above rounding",
        "Batch Jacobians and per-example gradients with training=True have no meaning. Training itself is not "
        "affected.",
        "Use training=False for them, and frozen_statistics=True for penalties on input gradients.",
        evidence.mixed_in_training,
    ),
    Rule(
        "no_influence", "error", "jacobian", "The outputs hardly depend on the inputs.",
        f"largest singular value, relative to the sizes of inputs and outputs, below {evidence.NO_GAIN:g}",
        "The model returns about the same for every example: signals vanish on the way, or units are saturated.",
        "Normalize the inputs, use He or Glorot initialization, and add normalization or residual connections.",
        evidence.no_influence,
    ),
    Rule(
        "large_gain", "warning", "jacobian", "Small changes of the inputs change the outputs strongly.",
        f"largest singular value, relative to the sizes of inputs and outputs, above {evidence.LARGE_GAIN:g}",
        "The model amplifies noise, and is likely to be unstable in training.",
        "Normalize the inputs, or train with kg.models.InputGradientRegularized.",
        evidence.large_gain,
    ),
    Rule(
        "low_rank", "warning", "jacobian", "The outputs depend on a single direction of the inputs.",
        f"effective rank below {evidence.LOW_RANK:g}, if it could be {evidence.LEAST_RANK} or more",
        "The layers have collapsed most directions. Deep networks without normalization do this when they are created.",
        "Use orthogonal initialization, normalization or residual connections, and look for a narrow layer.",
        evidence.low_rank,
    ),
    Rule(
        "unstable_rate", "error", "curvature", "The learning rate is too large for this curvature.",
        "learning rate times sharpness above 2 (1 + momentum)",
        "Gradient descent diverges along the steepest direction, or oscillates until it finds a flatter region.",
        "Lower the learning rate below the limit, warm it up, or use gradient clipping.",
        evidence.unstable_rate,
    ),
    Rule(
        "negative_curvature", "note", "curvature", "The weights are at a saddle, not at a minimum.",
        f"smallest eigenvalue below -{evidence.NEGATIVE_SHARE:g} times the largest",
        "This is normal early in training. At the end of training, the loss can still be lowered.",
        "Continue training. For Newton steps, use curvature='gauss_newton' or damping.",
        evidence.negative_curvature,
    ),
    Rule(
        "flat_loss", "error", "curvature", "The loss has no curvature at these weights.", "all eigenvalues are zero",
        "The loss does not depend on the weights here, or only linearly.",
        "Look for dead or saturated units, and for layers that receive no gradient.",
        evidence.flat_loss,
    ),
    Rule(
        "easily_fooled", "warning", "robustness", "Tiny changes of the inputs change the class.",
        f"median distance below {evidence.SMALL_DISTANCE:g} standard deviations of the inputs",
        "The classifier is easily fooled, and sensitive to noise.",
        "Train with kg.models.InputGradientRegularized or kg.models.AdversarialTraining.",
        evidence.easily_fooled,
    ),
    Rule(
        "masked_gradients", "warning", "robustness", "Gradients of the classifier are masked.",
        f"zero gradients at more than {evidence.MASKED:.0%} of the correctly classified examples",
        "Attacks and penalties follow gradients. Where these are zero, the distances say nothing about robustness.",
        "Return logits instead of probabilities, and check with an attack that uses no gradients.",
        evidence.masked_gradients,
    ),
)  # fmt: skip
