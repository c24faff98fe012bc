"""What users write, with annotations: strict type checkers pass on it, and it runs on every backend."""

from typing import Any

import keras
import numpy as np
from keras import ops

import keras_gradtools as kg


class WeightNorm(kg.callbacks.Monitor):
    """A monitor of the user's own."""

    def measure(self) -> dict[str, Any]:
        return {"norm": sum(float(ops.sum(w * w)) for w in self.model.trainable_variables)}


@kg.jit
def scaled(x: Any, factor: float) -> list[Any]:
    return [factor * x]


@kg.custom_gradient
def doubled(x: Any) -> tuple[Any, Any]:
    return x, lambda upstream: 2.0 * upstream


def cube(x: Any) -> Any:
    return ops.sum(x * x * x)


def derivatives(x: Any) -> tuple[float, ...]:
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = cube(x)
    variables: tuple[keras.Variable, ...] = tape.watched_variables()
    value, gradient = kg.value_and_grad(cube)(x)
    out, pullback = kg.vjp(cube, x)
    _, tangent = kg.jvp(cube, (x,), (ops.ones_like(x),))
    matrix, unravel = kg.flatten_hessian(kg.hessian(cube, chunk_size=2)(x))
    (product,) = kg.hvp(cube, (x,), (None,))
    first: Any = scaled(x, 2.0)[0]
    shown = [tape.gradient(y, x), kg.grad(cube, argnums=0)(x), gradient, *pullback(1.0), product, first, doubled(x)]
    shown += [kg.scale_gradient(x, 0.5), kg.straight_through(ops.round)(x), unravel(matrix[0])]
    return (float(value), float(out), float(tangent), float(len(variables)), *(float(ops.sum(s)) for s in shown))


def trained(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    wrapper = kg.models.InputGradientRegularized(model, 0.1, norm=2, method="exact", seed=1)
    wrapper.compile("sgd", "mse")
    callbacks = [WeightNorm(every="2 epochs"), kg.callbacks.CurvatureMonitor((x, y), trace_matvecs=0)]
    history: dict[str, list[float]] = wrapper.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
    return history


def measured(model: keras.Model, x: np.ndarray, y: np.ndarray) -> list[float]:
    hessian = kg.curvature.Hessian(model, "mse", (x, y), verbose=0)
    values, _ = hessian.eigsh(k=1, which="LA")
    estimate = kg.curvature.trace(2 * hessian + hessian, matvecs=99, method="hutch++")
    spectrum = kg.diagnostics.jacobian_spectrum(model, x, method="explicit")
    report = kg.diagnostics.batch_independence(model, x)
    jacobian = kg.batch_jacobian(model, mode="reverse")(x)
    trainer = kg.models.SecondOrder(model)
    trainer.compile(kg.optimizers.LevenbergMarquardt(scaling="diagonal"), "mse")
    trainer.fit(x, y, verbose=0)
    last = trainer.last_step
    found = [float(values[0]), float(estimate.value), float(spectrum.spectral_norm.max()), float(ops.sum(jacobian))]
    return [*found, float(report.independent is True), last.loss if last is not None else 0.0]
