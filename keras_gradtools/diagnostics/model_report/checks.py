"""The checks of a report. Each takes the `Subject` and fills a `Section`."""

import math
from typing import Any

import numpy as np

from keras_gradtools import nesting, validation
from keras_gradtools.attacks.batches import require_examples, require_labels
from keras_gradtools.attacks.robustness_report import robustness_report
from keras_gradtools.curvature.estimators.spectrum_ends import spectrum_ends
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.diagnostics.dead_units import dead_units
from keras_gradtools.diagnostics.gradient_noise import gradient_noise_scale
from keras_gradtools.diagnostics.jacobian_spectrum import jacobian_spectrum
from keras_gradtools.diagnostics.layer_derivatives import layer_derivatives
from keras_gradtools.diagnostics.layer_names import places_by_layer
from keras_gradtools.diagnostics.model_report import pictures
from keras_gradtools.diagnostics.model_report.subject import NotApplicable
from keras_gradtools.display.descriptions import short
from keras_gradtools.display.html import Table
from keras_gradtools.independence.batch_independence import batch_independence

# Few examples are enough for these checks, which cost much for each example.
_LAYER_EXAMPLES, _JACOBIAN_EXAMPLES, _ATTACK_EXAMPLES = 4, 16, 32
_ATTACK_STEPS = 5
# Products with the Hessian: at most these for the ends of the spectrum; probes and steps of the density.
_PRODUCTS, _PROBES, _STEPS = 40, 2, 25


def check_values(subject, section):
    """Calls the model, and counts examples with NaN or infinity."""
    outputs = subject.outputs
    bad = sum(int((~np.isfinite(y).reshape(len(y), -1).all(axis=1)).sum()) for y in outputs if y.ndim)
    section.measured |= {"outputs_not_finite": bad, "examples": subject.count}
    section.tables.append(Table([(f"output {i}", short(y)) for i, y in enumerate(outputs)]))
    if subject.y is not None and subject.given_loss is not None:
        loss = _hessian(subject).loss()
        section.measured["loss"] = loss
        section.tables.append(Table([("loss", short(loss))]))


def check_layers(subject, section):
    """Tests the second derivative of each layer."""
    found = layer_derivatives(subject.model, subject.first(_LAYER_EXAMPLES), seed=subject.seed, verbose=0)
    section.sentences += [part for part in found._parts() if isinstance(part, str)]
    section.tables += [part for part in found._parts() if isinstance(part, Table)]
    section.measured |= {
        "not_twice": [layer.path for layer in found.problems],
        "unclear": [layer.path for layer in found.unclear],
    }


def check_independence(subject, section):
    """Tests the independence of the examples in both modes."""
    x = subject.tensors()
    for training in (False, True):
        found = batch_independence(subject.model, x, training, seed=subject.seed)
        mode = "training" if training else "inference"
        section.sentences.append(f"In {mode} mode: {found}")
        section.measured |= {f"independent_in_{mode}": found.independent, f"mixing_in_{mode}": list(found.layers)}


def check_jacobian(subject, section):
    """Computes the singular values of the Jacobians."""
    x = subject.first(_JACOBIAN_EXAMPLES)
    found = jacobian_spectrum(subject.model, x, seed=subject.seed)
    inputs = [a for a in nesting.flatten(x) if a is not None and a.dtype.kind == "f"]
    # The largest relative change of the outputs by a relative change of the inputs.
    sizes = [_root_mean_square(arrays) for arrays in (inputs, subject.outputs)]
    gain = float(np.median(found.spectral_norm)) * sizes[0] / max(sizes[1], np.finfo("float32").tiny)
    section.measured["relative_gain"] = gain
    section.tables += [part for part in found._parts() if isinstance(part, Table)]
    section.tables.append(Table([("relative change of the outputs by a relative change of the inputs", short(gain))]))
    values = found.singular_values
    if values is not None:
        section.measured |= {
            "effective_rank": float(np.median(np.asarray(found.effective_rank))),
            "rank": values.shape[1],
        }
        section.draw = lambda figure: pictures.draw_spectrum(figure, values)
        section.caption = "Singular values of the Jacobian of each example: median and range over the examples."


def check_gradients(subject, section):
    """Computes the gradient by layer, dead units and the gradient noise."""
    operator = _hessian(subject)
    loss, gradient = operator.loss_and_gradient()
    gradient = gradient.astype("float64")
    places = places_by_layer(operator.model, operator.variables)
    parts = {name: np.concatenate([gradient[operator.slices[i]] for i in at]) for name, at in places.items()}
    norms = {name: float(np.linalg.norm(part)) for name, part in parts.items()}
    # Layers differ in size, so they are compared by the root mean square of their elements.
    means = {name: float(np.sqrt(np.mean(part**2))) for name, part in parts.items() if part.size}
    section.measured |= {"gradient_by_layer": means, "loss": loss, "gradient_norm": float(np.linalg.norm(gradient))}
    dead = {name: float(np.mean(is_dead)) for name, is_dead in dead_units(subject.model, subject.x).items()}
    section.measured["dead_units"] = dead
    rows = [
        (name, short(norms[name]), short(means[name]), f"{dead[name]:.0%}" if name in dead else "") for name in means
    ]
    section.tables.append(Table(rows, ("layer", "gradient norm", "of an element", "dead units")))
    others = [(name, f"{share:.0%}") for name, share in dead.items() if name not in means]
    section.tables += [Table(others, ("layer without weights", "dead units"))] if others else []
    if np.isfinite(gradient).all() and any(norms.values()):
        section.draw = lambda figure: pictures.draw_gradients(figure, norms)
        section.caption = "Norm of the gradient of the loss with respect to the weights of each layer."
    try:
        noise = gradient_noise_scale(subject.given, subject.loss, subject.loss_data)
        section.measured |= {"noise_scale": noise.noise_scale, "examples": noise.examples}
        section.tables.append(Table([("gradient noise scale, in examples", short(noise.noise_scale))]))
    except Exception as error:
        section.sentences.append(f"The gradient noise scale was left out. {_first_line(error)}")


def check_curvature(subject, section):
    """Estimates the spectrum of the Hessian."""
    hessian = _hessian(subject)
    linearized, n = hessian.linearized(), hessian.shape[0]
    ends = spectrum_ends(lambda v: linearized @ v, n, tol=1e-2, most=_PRODUCTS, samples=4, seed=subject.seed,
                         dtype="float64" if hessian.dtype == "float64" else "float32")  # fmt: skip
    density = hessian.spectral_density(_PROBES, min(_STEPS, n), points=400, seed=subject.seed)
    rate = _stable_rate(subject.given)
    section.measured |= {"largest": ends.largest, "smallest": ends.smallest, "rate_over_limit": None}
    rows = [("largest eigenvalue, the sharpness", short(ends.largest)), ("smallest eigenvalue", short(ends.smallest))]
    if ends.trace is not None:
        rows.append(("trace", f"{short(ends.trace.value)} ± {short(ends.trace.standard_error)}"))
    if rate is not None:
        learning_rate, limit = rate
        section.measured["rate_over_limit"] = learning_rate * ends.largest / limit
        rows.append(("learning rate times sharpness", f"{short(learning_rate * ends.largest)}, stable below {limit:g}"))
    section.tables.append(Table(rows))
    section.draw = lambda figure: pictures.draw_density(figure, density)
    section.caption = "Density of the eigenvalues of the Hessian of the loss."


def check_robustness(subject, section):
    """Estimates the distances of the examples from a misclassification."""
    kind = _name_of(subject.given_loss)
    if subject.y is None:
        raise NotApplicable("the data have no labels `y`.")
    if "crossentropy" not in kind.lower().replace("_", ""):
        raise NotApplicable(f"the model is not trained as a classifier: its loss is {kind!r}, not a cross-entropy.")
    x, y = subject.first(_ATTACK_EXAMPLES), nesting.map_structure(lambda a: a[:_ATTACK_EXAMPLES], subject.y)
    try:
        examples = require_examples("The check of robustness", subject.model, x, y, subject.clip)
        require_labels("The check of robustness", subject.model, examples)
    except ValueError as error:
        raise NotApplicable(_first_line(error)) from error
    spread = float(examples.x.std())
    options = {"clip": subject.clip, "max_epsilon": None if subject.clip else 4 * spread or 1.0}
    found = robustness_report(subject.model, x, y, **options, steps=_ATTACK_STEPS, seed=subject.seed, verbose=0)
    right = found.correct
    section.sentences += [part for part in found._parts() if isinstance(part, str)]
    section.tables += [part for part in found._parts() if isinstance(part, Table)]
    section.measured["accuracy"] = float(right.mean())
    if right.any():
        # Zero gradients give infinite first-order distances.
        section.measured |= {
            "relative_distance": float(np.quantile(found.attack[right], 0.5, method="lower")) / max(spread, 1e-12),
            "masked_share": float(np.mean(~np.isfinite(found.first_order[right]))),
        }
        section.draw = lambda figure: pictures.draw_robustness(figure, found)
        section.caption = "Distance of the examples from a misclassification."


def _hessian(subject):
    return Hessian(subject.given, subject.loss, subject.loss_data, verbose=0)


def _root_mean_square(arrays):
    values = np.concatenate([np.ravel(a).astype("float64") for a in arrays]) if arrays else np.zeros(1)
    finite = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else math.nan


def _stable_rate(model):
    """The learning rate of plain or heavy-ball gradient descent, and the limit of its product with the sharpness."""
    optimizer: Any = getattr(model, "optimizer", None)
    if type(optimizer).__name__ != "SGD" or getattr(optimizer, "nesterov", False):
        return None
    return float(optimizer.learning_rate), 2.0 * (1.0 + float(getattr(optimizer, "momentum", 0.0) or 0.0))


def _name_of(loss):
    if isinstance(loss, (dict, list, tuple)):
        return ", ".join(_name_of(one) for one in nesting.flatten(loss))
    return loss if isinstance(loss, str) else getattr(loss, "name", None) or validation.name_of(loss)


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
