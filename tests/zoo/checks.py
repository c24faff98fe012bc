"""What is tried of each model: derivatives against differences, and that what trains and watches runs."""

import os
import tempfile
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

# Down to the smallest for deep networks without training, whose gradients change within a thousandth.
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# Parts of some models compute in single precision, whatever the policy.
RTOL, ATOL = 2e-3, 1e-6
# A noise scale where three examples leave no gradient above the noise; a condition number of a singular Jacobian; the
# ratio of a step that was not taken.
MAY_BE_INFINITE = ("gradient_noise_scale", "jacobian_condition_number_median", "newton_ratio")

# Outputs of a model whose derivatives single precision no longer holds.
EXPLODED = 1e10


class Found(NamedTuple):
    """`right`, `wrong`, `unclear`, `none` for what does not apply, or `error`, a clear one; and what was found."""

    status: str
    text: str = ""


def compared(exact, difference):
    """`exact` against `difference(h)`, arrays: wrong where differences agree with each other and not with it."""
    found, errors = [], []
    for h in STEPS:
        found.append(difference(h))
        error = np.linalg.norm(found[-1] - exact)
        errors.append(error / max(np.linalg.norm(exact), np.linalg.norm(found[-1]), 1e-300))
        if error <= RTOL * np.linalg.norm(found[-1]) + ATOL:
            return Found("right", f"{errors[-1]:.0e}")
    for before, after in zip(found, found[1:], strict=False):
        # At a kink, and where a step is lost in rounding, they disagree with each other as well.
        if np.linalg.norm(after - before) <= 0.2 * np.linalg.norm(after - exact):
            return Found("wrong", f"off by {min(errors):.2g} of its length")
    return Found("unclear", f"differences do not converge; nearest {min(errors):.2g}")


class Weights:
    """A model's outputs and loss as functions of all its weights, in one vector."""

    def __init__(self, specimen):
        self.specimen = specimen
        self.fun, self.start = kg.functionalize(specimen.model)
        self.start = [ops.convert_to_tensor(w) for w in self.start]
        self._loss = specimen.loss if callable(specimen.loss) else keras.losses.get(specimen.loss)
        self.x = keras.tree.map_structure(ops.convert_to_tensor, specimen.x)
        self.y = ops.convert_to_tensor(specimen.y)

    def outputs(self, weights):
        return self.fun(weights, self.x, training=False)

    def loss_of(self, outputs):
        return ops.mean(self._loss(self.y, outputs))

    def loss(self, weights):
        return self.loss_of(self.outputs(weights))

    def vector(self, tensors):
        return np.concatenate([numbers(t).ravel() for t in tensors])

    def pack(self, vector):
        ends = np.cumsum([int(np.prod(w.shape)) for w in self.start])[:-1]
        parts = zip(np.split(vector, ends), self.start, strict=True)
        return [ops.convert_to_tensor(p.reshape(tuple(w.shape)), dtype=w.dtype) for p, w in parts]

    def differences(self, fun, v):
        """Central differences of `fun` of the vector of weights, along v."""
        start = self.vector(self.start)
        return lambda h: (fun(self.pack(start + h * v)) - fun(self.pack(start - h * v))) / (2 * h)

    def gradient(self, weights):
        return self.vector(kg.grad(self.loss)(weights))

    def direction(self):
        """Of length one: random, and partly along the gradient, so that no derivative along it is rounding."""
        g = self.gradient(self.start)
        v = np.random.default_rng(0).normal(size=g.size)
        v = v / np.linalg.norm(v) + g / max(np.linalg.norm(g), 1e-300)
        return v / np.linalg.norm(v)


def numbers(x):
    return np.asarray(ops.convert_to_numpy(ops.stop_gradient(x)), "float64")


def gradient(specimen):
    w = Weights(specimen)
    v = w.direction()
    exact = np.array([w.gradient(w.start) @ v])
    return compared(exact, w.differences(lambda weights: np.array([float(numbers(w.loss(weights)))]), v))


def hvp(specimen):
    w = Weights(specimen)
    v = w.direction()
    exact = w.vector(kg.hvp(w.loss, (w.start,), (w.pack(v),))[0])
    return compared(exact, w.differences(w.gradient, v))


def ggn(specimen):
    """J^T H J v, with J v by differences, the Hessian of the loss by the outputs by differences of its gradient."""
    w = Weights(specimen)
    v = w.direction()
    exact = w.vector(kg.ggnvp(w.outputs, w.loss_of, (w.start,), (w.pack(v),))[0])
    z = w.outputs(w.start)

    def product(h):
        u = w.differences(lambda weights: numbers(w.outputs(weights)), v)(h)

        def slope(sign):
            moved = ops.convert_to_tensor(numbers(z) + sign * h * u, dtype=z.dtype)
            return numbers(kg.grad(w.loss_of)(moved))

        curved = ops.convert_to_tensor((slope(1) - slope(-1)) / (2 * h), dtype=z.dtype)
        return w.gradient_of(lambda weights: ops.sum(w.outputs(weights) * curved))

    w.gradient_of = lambda fun: w.vector(kg.grad(fun)(w.start))
    return compared(exact, product)


def jacobian(specimen):
    """The batch Jacobian by the floating-point inputs, or by the output of the embedding of the tokens."""
    model, x = specimen.model, keras.tree.map_structure(ops.convert_to_tensor, specimen.x)
    if not specimen.has_float_inputs:
        try:
            model, x = after_embedding(model, x)
        except NoPart as error:
            return Found("none", str(error))
    leaves = keras.tree.flatten(x)
    floats = [i for i, leaf in enumerate(leaves) if keras.backend.is_float_dtype(leaf.dtype)]
    random = np.random.default_rng(0)
    moves = {i: random.normal(size=tuple(leaves[i].shape)) for i in floats}

    def fun(h):
        moved = list(leaves)
        for i, move in moves.items():
            moved[i] = ops.convert_to_tensor(numbers(leaves[i]) + h * move, dtype=leaves[i].dtype)
        return numbers(model(keras.tree.pack_sequence_as(x, moved), training=False))

    blocks = keras.tree.flatten(kg.batch_jacobian(model)(x, training=False))
    count = leaves[0].shape[0]
    exact = 0.0
    for i, move in moves.items():
        block = numbers(blocks[i])
        rows = block.reshape(count, -1, move[0].size)
        exact = exact + np.einsum("bki,bi->bk", rows, move.reshape(count, -1))
    return compared(exact, lambda h: ((fun(h) - fun(-h)) / (2 * h)).reshape(count, -1))


def after_embedding(model, x):
    """The part of a model after its first embedding of tokens, as a function of that embedding and all inputs."""
    embeddings = [layer for layer in model.layers if type(layer).__name__ in EMBEDDINGS and "segment" not in layer.name]
    inputs, flat = keras.tree.flatten(model.input), keras.tree.flatten(x)
    for layer in embeddings:
        embedded = layer._inbound_nodes[0].output_tensors[0]
        try:
            rest = keras.Model([embedded, *inputs], model.output)
            return rest, [keras.Model(inputs, embedded)(flat), *flat]
        except ValueError:
            continue
    raise NoPart("no part of the model is a function of the embedding alone")


class NoPart(Exception):
    """Where a model is not in two parts."""


EMBEDDINGS = ("ReversibleEmbedding", "Embedding", "TokenAndPositionEmbedding")


def independence(specimen):
    """What it says, and whether an example has other outputs among copies of itself."""
    report = kg.diagnostics.batch_independence(specimen.model, specimen.x)
    before = numbers(specimen.model(keras.tree.map_structure(ops.convert_to_tensor, specimen.x), training=False))
    crosses = False
    for i in range(len(before)):
        copies = keras.tree.map_structure(lambda a: ops.convert_to_tensor(np.stack([a[i]] * len(a))), specimen.x)  # noqa: B023
        after = numbers(specimen.model(copies, training=False))
        crosses = crosses or not np.allclose(before[i], after[i], rtol=1e-4, atol=1e-5)
    if report.independent is None:
        return Found("unclear", report.reason)
    return Found("right" if report.independent is not crosses else "wrong", "" if report.independent else str(report))


def layer_derivatives(specimen):
    report = kg.diagnostics.layer_derivatives(specimen.model, specimen.x, verbose=0)
    if report.twice_differentiable:
        unclear = ", ".join(layer.path for layer in report.unclear)
        return Found("right", f"unclear: {unclear}" if unclear else "")
    said = "; ".join(f"{layer.path}: {layer.verdict}" for layer in report.problems)
    # What it accuses the product with the Hessian decides.
    truth = hvp(specimen)
    return Found("wrong" if truth.status == "right" else "right", f"accuses {said}; hvp is {truth.status}")


def _trained(trainer, specimen, optimizer):
    trainer.compile(optimizer, specimen.loss)
    before = [np.array(w) for w in trainer.get_weights()]
    losses = [_first(trainer.train_on_batch(specimen.x, specimen.y)) for _ in range(2)]
    changed = any(np.any(a != b) for a, b in zip(before, trainer.get_weights(), strict=True))
    good = np.all(np.isfinite(losses)) and changed and all(np.all(np.isfinite(w)) for w in trainer.get_weights())
    return Found("right" if good else "wrong", "" if good else f"losses {losses}, weights changed: {changed}")


def _first(logs):
    return float(logs[0] if isinstance(logs, (list, tuple)) else logs)


def penalty(specimen):
    return _trained(kg.models.InputGradientRegularized(specimen.model, 0.1), specimen, keras.optimizers.Adam(1e-3))


def adversarial(specimen):
    attack = kg.attacks.PGD(0.1, steps=2, clip=None, loss=specimen.loss)
    return _trained(kg.models.AdversarialTraining(specimen.model, attack, 0), specimen, keras.optimizers.Adam(1e-3))


def second_order(specimen):
    trainer = kg.models.SecondOrder(specimen.model, training=False)
    trainer.compile(kg.optimizers.NewtonCG(curvature="gauss_newton", max_iterations=3), specimen.loss)
    losses = trainer.fit(specimen.x, specimen.y, epochs=2, verbose=0, batch_size=len(specimen.y)).history["loss"]
    good = np.all(np.isfinite(losses)) and losses[1] <= losses[0] * (1 + 1e-5)
    return Found("right" if good else "wrong", f"losses {losses}")


def _monitored(specimen, callback, names):
    model = specimen.model
    model.compile(keras.optimizers.SGD(1e-3), specimen.loss)
    history = model.fit(
        specimen.x, specimen.y, epochs=1, verbose=0, batch_size=len(specimen.y), callbacks=[callback]
    ).history
    found = {name: values[-1] for name, values in history.items() if name.startswith(names)}
    if not found:
        return Found("error", "nothing was logged")
    bad = [name for name, value in found.items() if not np.isfinite(value) and name not in MAY_BE_INFINITE]
    outputs = numbers(keras.tree.flatten(model(specimen.x, training=False))[0])
    if bad and not np.abs(outputs).max() < EXPLODED:
        return Found("unclear", f"the model itself returns NaN, or more than {EXPLODED:g}, after its training step")
    return Found("wrong" if bad else "right", f"not finite: {bad}" if bad else "")


def jacobian_monitor(specimen):
    return _monitored(specimen, kg.callbacks.BatchJacobianMonitor(specimen.x), "jacobian_")


def robustness_monitor(specimen):
    x, y = specimen.x, specimen.y
    return _monitored(specimen, kg.callbacks.RobustnessMonitor((x, y), clip=None, steps=2, jacobian=False), "val_")


def gradient_monitor(specimen):
    return _monitored(specimen, kg.callbacks.GradientMonitor((specimen.x, specimen.y), per_layer=False), "gradient_")


def curvature_monitor(specimen):
    return _monitored(specimen, kg.callbacks.CurvatureMonitor((specimen.x, specimen.y)), "hessian_")


def newton_step(specimen):
    data = (specimen.x, specimen.y)
    return _monitored(specimen, kg.callbacks.NewtonStep(data, curvature="gauss_newton", max_iterations=3), "newton_")


def save(specimen):
    """A trainer saved and loaded computes the same, unless Keras cannot do that with the model itself."""
    try:
        good = _is_same_when_loaded(kg.models.SecondOrder(specimen.model, training=False), specimen)
    except Exception as error:
        try:
            _is_same_when_loaded(specimen.model, specimen)
        except Exception as alone:
            return Found("framework", f"so is the model alone: {type(alone).__name__}: {alone}")
        raise error
    return Found("right" if good else "wrong", "" if good else "outputs differ")


def _is_same_when_loaded(model, specimen):
    x = keras.tree.map_structure(ops.convert_to_tensor, specimen.x)
    classes = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
    # What Keras has itself it finds better by itself.
    classes = {name: cls for name, cls in classes.items() if not cls.__module__.startswith("keras.")}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path, custom_objects=classes)
    return np.allclose(numbers(model(x)), numbers(loaded(x)), rtol=1e-5, atol=1e-6)


# In double precision as far as a model lets it; the others as people run them.
IN_DOUBLE = {f.__name__: f for f in (gradient, hvp, ggn, jacobian)}
IN_SINGLE = {
    f.__name__: f
    for f in (
        independence,
        layer_derivatives,
        penalty,
        adversarial,
        second_order,
        jacobian_monitor,
        robustness_monitor,
        gradient_monitor,
        curvature_monitor,
        newton_step,
        save,
    )
}
CHECKS = IN_DOUBLE | IN_SINGLE
