"""A call of every public function and class that is right, and the sorts of its arguments."""

import functools

import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
import keras  # noqa: E402
import matplotlib.pyplot  # noqa: E402
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402

import keras_gradtools as kg  # noqa: E402

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
Y = np.array([0, 1, 1, 0])
VECTOR = np.ones(3, "float32")
TENSOR = ops.ones(3)
PICTURES = np.random.default_rng(1).uniform(0.2, 0.8, size=(4, 3)).astype("float32")


def model():
    return made("tanh")


def classifier():
    return made("softmax")


@functools.cache
def made(activation):
    found = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation)])
    found.compile("sgd", "mse")
    return found


def loss(y, y_pred):
    return ops.mean(ops.square(y_pred), axis=-1)


def square(x):
    return ops.sum(x * x)


def weighted(weights, x):
    return ops.sum(weights * x)


@functools.cache
def hessian_operator():
    return kg.curvature.Hessian(model(), "mse", (X, X[:, :2]), verbose=0)


def used(transform, *names):
    """A row's call: the transform with its options, and what it made on arguments."""

    def call(**given):
        options = {name: x for name, x in given.items() if name not in names}
        return transform(**options)(*(given[name] for name in names))

    return call


def method(make, name, **fixed):
    return lambda **given: getattr(make(), name)(**fixed, **given)


def layer_on(cls, **fixed):
    """A layer made with options, and called."""
    return lambda **options: cls(**fixed, **options)(VECTOR[None])


def recorded(name):
    def call(**given):
        x = ops.convert_to_tensor(X)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x * x
        values = {"target": y, "sources": x, "source": x, **given}
        accepted = {"source"} if name == "batch_jacobian" else {"sources"}
        return getattr(tape, name)(**{k: v for k, v in values.items() if k in given or k in ("target", *accepted)})

    return call


def watched(tensor):
    with kg.GradientTape() as tape:
        tape.watch(tensor)


ATTACK = {"epsilon": 0.1, "norm": "inf", "clip": (0.0, 1.0), "steps": 1, "restarts": 1, "batch_size": 4, "verbose": 0}
ATTACK_SORTS = {
    "model": "model",
    "x": "examples",
    "y": "labels",
    "epsilon": "number",
    "norm": "choice",
    "clip": "clip?",
    "steps": "count",
    "restarts": "count",
    "batch_size": "count",
    "verbose": "bar",
}


def without(sorts, *names):
    return {name: sort for name, sort in sorts.items() if name not in names}


def attack_row(fun, sorts, **others):
    values = {"model": classifier(), "x": PICTURES, "y": Y, **{k: v for k, v in ATTACK.items() if k in sorts}, **others}
    return fun, values, sorts


def rows():
    d, c, a, o, cb, pl = kg.diagnostics, kg.curvature, kg.attacks, kg.optimizers, kg.callbacks, kg.plots
    density = c.SpectralDensity(np.arange(3.0), np.ones(3), np.ones(3), np.ones((1, 1)), np.ones((1, 1)), 1.0)
    surface = c.LossSurface(np.arange(3.0), np.arange(3.0), np.arange(9.0).reshape(3, 3), np.ones(2))
    distances = np.ones(4)
    report = a.RobustnessReport(distances > 0, *[distances] * 6, 1.0, 1.0, 2)
    found = np.array([[1.0], [0.9]])
    sweep = kg.regularization.PenaltyWeightSweep(
        np.array([0.0, 0.1]), found, found, found[:, 0] > 1, max_drop=0.1, epsilon=0.1, norm=2, examples=10
    )
    common = {"model": model(), "x": X}
    batches = {"data": (X, X[:, :2])}
    operator = {"model": model(), "loss": "mse", **batches}
    operator_sorts = {"model": "model", "loss": "loss", "data": "data", "training": "flag", "batch_size": "count"}
    attack_sorts = without(ATTACK_SORTS, "steps", "restarts")
    penalty = {"weight": 0.1, "norm": 2, "squared": True, "center": 0.0, "method": "exact", "step_size": 0.1}
    penalty_sorts = {
        "weight": "number", "norm": "choice", "squared": "flag", "center": "number", "method": "choice",
        "step_size": "number", "projections": "projections", "frozen_statistics": "flag", "every": "count",
        "seed": "seed?", "target": "choice",
    }  # fmt: skip
    matrix = np.diag([2.0, 1.0, 3.0])
    metric_sorts = {
        **without(ATTACK_SORTS, "epsilon"),
        "epsilons": "epsilons",
        "jacobian": "flag",
        "seed": "seed?",
    }
    report_sorts = {**without(ATTACK_SORTS, "epsilon"), "max_epsilon": "number?", "seed": "seed?"}
    fit_sorts = {"every": "every", "training": "flag", "batch_size": "count"}
    return {
        "grad": (
            used(kg.grad, "x"),
            {"fun": square, "x": VECTOR},
            "fun: function, x: tensor, argnums: positions, has_aux: flag",
        ),
        "value_and_grad": (
            used(kg.value_and_grad, "x"),
            {"fun": square, "x": VECTOR},
            "fun: function, x: tensor, argnums: positions, has_aux: flag",
        ),
        "vjp": (
            lambda fun, x, **k: kg.vjp(fun, x, **k),
            {"fun": square, "x": VECTOR},
            "fun: function, x: tensor, has_aux: flag",
        ),
        "vjp.pullback": (
            lambda cotangent: kg.vjp(lambda x: x * x, VECTOR)[1](cotangent),
            {"cotangent": VECTOR},
            "cotangent: cotangent",
        ),
        "jvp": (
            kg.jvp,
            {"fun": square, "primals": (VECTOR,), "tangents": (VECTOR,)},
            "fun: function, primals: structure, tangents: structure, has_aux: flag",
        ),
        "jet": (
            kg.jet,
            {"fun": square, "primals": (VECTOR,), "series": ([VECTOR, VECTOR],)},
            "fun: function, primals: structure, series: structure",
        ),
        "linearize": (
            lambda fun, x, **k: kg.linearize(fun, x, **k),
            {"fun": square, "x": VECTOR},
            "fun: function, x: tensor, has_aux: flag",
        ),
        "linearize.pushforward": (
            lambda tangent: kg.linearize(square, VECTOR)[1](tangent),
            {"tangent": VECTOR},
            "tangent: cotangent",
        ),
        "jacobian": (
            used(kg.jacobian, "x"),
            {"fun": ops.sin, "x": VECTOR},
            "fun: function, x: tensor, argnums: positions, mode: choice, chunk_size: count?, has_aux: flag",
        ),
        "batch_jacobian": (
            used(kg.batch_jacobian, "x"),
            {"fun": ops.sin, "x": X},
            (
                "fun: function, x: examples, mode: choice, chunk_size: count?, check_independence: flag, "
                "argnums: positions, has_aux: flag"
            ),
        ),
        "hessian": (
            used(kg.hessian, "x"),
            {"fun": square, "x": VECTOR},
            "fun: function, x: tensor, argnums: positions, chunk_size: count?, has_aux: flag",
        ),
        "hvp": (
            kg.hvp,
            {"fun": square, "primals": (VECTOR,), "tangents": (VECTOR,)},
            "fun: function, primals: structure, tangents: structure",
        ),
        "ggnvp": (
            kg.ggnvp,
            {"model_fun": ops.sin, "loss_fun": square, "primals": (VECTOR,), "tangents": (VECTOR,)},
            "model_fun: function, loss_fun: function, primals: structure, tangents: structure",
        ),
        "per_example_grad": (
            used(kg.per_example_grad, "weights", "x"),
            {"fun": weighted, "weights": VECTOR, "x": X},
            "fun: function, weights: tensor, x: examples, argnums: positions, has_aux: flag",
        ),
        "laplacian": (
            used(kg.laplacian, "x"),
            {"fun": lambda x: ops.sum(x**2, axis=1), "x": X, "samples": 2},
            "fun: function, x: examples, axes: axes?, chunk_size: count?, samples: count?, directions: choice, "
            "seed: seed?, return_standard_error: flag",
        ),
        "divergence": (
            used(kg.divergence, "x"),
            {"fun": lambda x: x**2, "x": X, "samples": 2},
            "fun: function, x: examples, axes: axes?, chunk_size: count?, samples: count?, directions: choice, "
            "seed: seed?, return_standard_error: flag",
        ),
        "partial_derivatives": (
            used(kg.partial_derivatives, "x"),
            {"fun": lambda x: x**2, "derivatives": [(0,), (0, 1)], "x": X},
            "fun: function, derivatives: structure, argnums: positions",
        ),
        "flatten_hessian": (kg.flatten_hessian, {"blocks": kg.hessian(square)(VECTOR)}, "blocks: structure"),
        "kernel_hessian": (
            used(kg.kernel_hessian, "x"),
            {"fun": lambda x: square(model()(x)), "layer": model().layers[-1], "x": X},
            "fun: function, layer: model",
        ),
        "jit": (used(kg.jit), {"fun": lambda: ops.ones(1)}, "fun: function"),
        "functionalize": (kg.functionalize, {"model": model()}, "model: model"),
        "functionalized": (
            lambda weights, x: kg.functionalize(model())[0](weights, x),
            {"weights": kg.functionalize(model())[1], "x": X},
            "weights: structure",
        ),
        "custom_gradient": (kg.custom_gradient, {"fun": lambda x: (x, lambda u: u)}, "fun: function"),
        "straight_through": (kg.straight_through, {"fun": ops.round}, "fun: function"),
        "clip_gradient_norm": (
            kg.clip_gradient_norm,
            {"x": TENSOR, "max_norm": 1.0},
            "x: node, max_norm: number",
        ),
        "clip_gradient_value": (
            kg.clip_gradient_value,
            {"x": TENSOR, "max_value": 1.0},
            "x: node, max_value: number",
        ),
        "scale_gradient": (kg.scale_gradient, {"x": TENSOR, "scale": 1.0}, "x: node, scale: scale"),
        "reverse_gradient": (kg.reverse_gradient, {"x": TENSOR, "scale": 1.0}, "x: node, scale: scale"),
        "stop_gradient": (kg.stop_gradient, {"x": TENSOR}, "x: nesting"),
        "GradientTape": (kg.GradientTape, {"persistent": False}, "persistent: flag, watch_accessed_variables: flag"),
        "tape.watch": (watched, {"tensor": TENSOR}, "tensor: nesting"),
        "tape.gradient": (
            recorded("gradient"),
            {"output_gradients": X},
            "target: tensor, sources: tensor, output_gradients: tensor, unconnected_gradients: choice",
        ),
        "tape.jacobian": (
            recorded("jacobian"),
            {"chunk_size": 2},
            "target: tensor, sources: tensor, unconnected_gradients: choice, chunk_size: count, mode: choice",
        ),
        "tape.batch_jacobian": (
            recorded("batch_jacobian"),
            {"chunk_size": 2},
            (
                "target: tensor, source: tensor, unconnected_gradients: choice, chunk_size: count, "
                "mode: choice, check_independence: flag"
            ),
        ),
        "tape.jvp": (recorded("jvp"), {"tangents": X}, "target: tensor, sources: tensor, tangents: tensor"),
        "dead_units": (d.dead_units, common, "model: model, x: examples, training: flag"),
        "local_lipschitz": (
            d.local_lipschitz,
            {**common, "iterations": 1},
            "model: model, x: examples, radius: number, training: flag, iterations: count, seed: seed",
        ),
        "jacobian_spectrum": (
            d.jacobian_spectrum,
            common,
            "model: model, x: examples, training: flag, method: choice, iterations: count, seed: seed",
        ),
        "batch_independence": (d.batch_independence, common, "model: model, x: examples, training: flag, seed: seed"),
        "gradient_noise_scale": (
            d.gradient_noise_scale,
            {"model": model(), **batches, "loss": "mse"},
            (
                "model: model, data: data, loss: loss?, variables: variables?, training: flag, "
                "batch_size: count, chunk_size: count?"
            ),
        ),
        "layer_derivatives": (
            d.layer_derivatives,
            {**common, "verbose": 0},
            "model: model, x: examples?, training: flag, seed: seed, verbose: bar",
        ),
        "input_gradient_penalty": (
            kg.regularization.input_gradient_penalty,
            {"model": model(), "x": X, "target": "outputs", **without(penalty, "weight")},
            {"model": "model", "x": "examples", **without(penalty_sorts, "weight", "every"), "training": "flag"},
        ),
        "fgsm": attack_row(a.fgsm, attack_sorts),
        "pgd": attack_row(
            a.pgd, {**ATTACK_SORTS, "seed": "seed?", "random_start": "flag", "targeted": "flag", "step_size": "number?"}
        ),
        "robustness_metrics": attack_row(a.robustness_metrics, metric_sorts, epsilons=(0.1,)),
        "robustness_report": attack_row(a.robustness_report, report_sorts),
        "penalty_weight_sweep": (
            kg.regularization.penalty_weight_sweep,
            {
                "train": lambda weight: classifier(),
                "penalty_weights": [0.1],
                "x": PICTURES,
                "y": Y,
                "steps": 1,
                "verbose": 0,
            },
            {
                **without(ATTACK_SORTS, "model"),
                "train": "function",
                "penalty_weights": "epsilons",
                "max_drop": "number",
            },
        ),
        "FGSM": (a.FGSM, {"epsilon": 0.1}, "epsilon: number, norm: choice, clip: clip?, targeted: flag"),
        "PGD": (
            a.PGD,
            {"epsilon": 0.1},
            (
                "epsilon: number, norm: choice, clip: clip?, steps: count, restarts: count, step_size: number?, "
                "random_start: flag, targeted: flag, seed: seed?"
            ),
        ),
        "GaussianNoise": (a.GaussianNoise, {"stddev": 0.1}, "stddev: number, clip: clip?"),
        "AdversarialTraining": (
            kg.models.AdversarialTraining,
            {"model": classifier(), "attack": a.FGSM(0.1)},
            "model: model, attack: choice, seed: seed?",
        ),
        "InputGradientRegularized": (
            kg.models.InputGradientRegularized,
            {"model": model(), **penalty},
            {"model": "model", **penalty_sorts, "inputs": "inputs?"},
        ),
        "SquaredResiduals": (
            kg.losses.SquaredResiduals,
            {"residuals": lambda model, x: model(x)},
            "residuals: function",
        ),
        "CompiledTraining": (kg.models.CompiledTraining, {"model": model()}, "model: model"),
        "SecondOrder": (kg.models.SecondOrder, {"model": model()}, "model: model, training: flag"),
        "InputGradientPenalty": (
            kg.layers.InputGradientPenalty,
            {"layer": keras.layers.Dense(1), **penalty},
            {"layer": "model", **penalty_sorts},
        ),
        "BatchJacobian": (
            kg.layers.BatchJacobian,
            {"layer": keras.layers.Dense(1)},
            "layer: model, return_outputs: flag",
        ),
        "Laplacian": (
            kg.layers.Laplacian,
            {"layer": keras.layers.Dense(1)},
            "layer: model, axes: layer axes?, return_outputs: flag",
        ),
        "PartialDerivatives": (
            kg.layers.PartialDerivatives,
            {"layer": keras.layers.Dense(1), "derivatives": [(0,)]},
            "layer: model, derivatives: structure",
        ),
        "Divergence": (
            kg.layers.Divergence,
            {"layer": keras.layers.Dense(3)},
            "layer: model, axes: layer axes?, return_outputs: flag",
        ),
        "ClipGradientNorm": (kg.layers.ClipGradientNorm, {"max_norm": 1.0}, "max_norm: number"),
        "ClipGradientValue": (kg.layers.ClipGradientValue, {"max_value": 1.0}, "max_value: number"),
        "ScaleGradient": (kg.layers.ScaleGradient, {"scale": 1.0}, "scale: number"),
        "ReverseGradient": (kg.layers.ReverseGradient, {"scale": 1.0}, "scale: number"),
        "layers.CustomGradient": (kg.layers.CustomGradient, {"fun": lambda x: (x, lambda u: u)}, "fun: function"),
        "layers.StraightThrough": (kg.layers.StraightThrough, {"fun": ops.round}, "fun: function"),
        "Newton": (
            o.Newton,
            {},
            "damping: number, max_attempts: count, allow_underdetermined: flag, learning_rate: number",
        ),
        "LBFGS": (o.LBFGS, {}, "memory: count, max_evaluations: count"),
        "BFGS": (o.BFGS, {}, "update: choice, scales_first: flag, max_evaluations: count, max_weights: count"),
        "NewtonCG": (
            o.NewtonCG,
            {},
            (
                "damping: number, curvature: choice, max_iterations: count, rtol: number?, "
                "progress_tol: number?, preconditioner_rank: rank?, max_attempts: count"
            ),
        ),
        "LevenbergMarquardt": (
            o.LevenbergMarquardt,
            {},
            "damping: number, scaling: choice, max_attempts: count, geodesic_acceleration: flag",
        ),
        "Hessian": (c.Hessian, operator, {**operator_sorts, "variables": "variables?", "verbose": "bar"}),
        "GaussNewton": (c.GaussNewton, operator, {**operator_sorts, "variables": "variables?", "verbose": "bar"}),
        "Fisher": (
            c.Fisher,
            operator,
            {**operator_sorts, "kind": "choice", "samples": "count", "seed": "seed", "verbose": "bar"},
        ),
        "operator @": (lambda x: hessian_operator() @ x, {"x": np.ones(8)}, "x: vector"),
        "operator.dense": (method(hessian_operator, "dense"), {}, "chunk_size: count?"),
        "operator.blocks": (method(hessian_operator, "blocks"), {}, "chunk_size: count?"),
        "operator.diagonal": (method(hessian_operator, "diagonal"), {"matvecs": 3}, "matvecs: count, seed: seed"),
        "operator.trace": (
            method(hessian_operator, "trace"),
            {"matvecs": 6},
            "matvecs: count, method: choice, seed: seed",
        ),
        "operator.eigsh": (
            method(hessian_operator, "eigsh"),
            {"k": 1},
            "k: count, which: choice, ncv: count?, max_restarts: count from 0?, tol: number?, seed: seed",
        ),
        "operator.spectral_density": (
            method(hessian_operator, "spectral_density"),
            {"probes": 2, "steps": 2, "points": 4},
            "probes: count, steps: count, points: count, width: number?, seed: seed",
        ),
        "operator.loss_surface": (
            method(hessian_operator, "loss_surface"),
            {"points": 3},
            "directions: directions?, distance: number, points: count, seed: seed",
        ),
        "operator.loss": (method(hessian_operator, "loss"), {}, "offset: vector?"),
        "operator.gradient": (method(hessian_operator, "gradient"), {}, "offset: vector?"),
        "operator.move": (method(hessian_operator, "move"), {"offset": np.zeros(8)}, "offset: vector"),
        "trace": (c.trace, {"a": matrix, "matvecs": 6}, "a: matrix, matvecs: count, method: choice, seed: seed"),
        "diagonal": (c.diagonal, {"a": matrix, "matvecs": 3}, "a: matrix, matvecs: count, seed: seed"),
        "eigsh": (
            c.eigsh,
            {"a": matrix, "k": 1},
            "a: matrix, k: count, which: choice, ncv: count?, max_restarts: count from 0?, tol: number?, seed: seed",
        ),
        "spectral_density": (
            c.spectral_density,
            {"a": matrix, "probes": 2, "steps": 2, "points": 4},
            "a: matrix, probes: count, steps: count, points: count, width: number?, seed: seed",
        ),
        "loss_surface": (
            method(hessian_operator, "loss_surface"),
            {"points": 2},
            "directions: directions?, distance: number, points: count, seed: seed",
        ),
        "critical_sharpness": (
            lambda **options: c.critical_sharpness(hessian_operator(), **options),
            {},
            "direction: vector?, start: number?, tol: number",
        ),
        "conjugate_gradients": (
            c.conjugate_gradients,
            {"a": matrix, "b": np.ones(3)},
            (
                "a: matrix, b: column, x0: column?, damping: number, preconditioner: function?, rtol: number, "
                "atol: number, progress_tol: number?, max_iterations: count from 0?, callback: function?"
            ),
        ),
        "damped_solve": (
            c.damped_solve,
            {"a": matrix, "b": np.ones(3)},
            "a: matrix, b: column, damping: number, factor: number",
        ),
        "BatchJacobianMonitor": (
            cb.BatchJacobianMonitor,
            {"x": X},
            (
                "x: examples, every: every, quantities: quantities?, training: flag, method: choice, "
                "radius: number, seed: seed"
            ),
        ),
        "CurvatureMonitor": (
            cb.CurvatureMonitor,
            batches,
            {
                "data": "data",
                **fit_sorts,
                "variables": "variables?",
                "loss": "loss?",
                "tol": "number",
                "trace_matvecs": "count from 0",
                "seed": "seed",
            },
        ),
        "GradientMonitor": (
            cb.GradientMonitor,
            batches,
            {
                "data": "data",
                **fit_sorts,
                "quantities": "quantities?",
                "variables": "variables?",
                "loss": "loss?",
                "per_layer": "flag",
                "log_dir": "directory?",
            },
        ),
        "Monitor": (cb.Monitor, {}, "every: every, prefix: text, log_dir: directory?, progress_bar: names?"),
        "NewtonStep": (
            cb.NewtonStep,
            batches,
            {
                "data": "data",
                **fit_sorts,
                "variables": "variables?",
                "solver": "choice",
                "curvature": "choice",
                "damping": "number",
                "loss": "loss?",
                "max_iterations": "count",
                "rtol": "number?",
                "preconditioner_rank": "rank?",
                "max_attempts": "count",
                "allow_underdetermined": "flag",
                "verbose": "verbosity",
            },
        ),
        "RobustnessMonitor": (
            cb.RobustnessMonitor,
            {"data": (PICTURES, Y)},
            (
                "data: data, epsilons: epsilons, every: every, norm: choice, clip: clip?, "
                "steps: count, restarts: count, jacobian: flag, seed: seed?, batch_size: count"
            ),
        ),
        "check_jvp": (
            kg.testing.check_jvp,
            {"fun": ops.sin, "primals": (VECTOR,)},
            (
                "fun: function, primals: structure, tangents: structure?, rtol: number?, atol: number?, "
                "step: number?, seed: seed"
            ),
        ),
        "check_vjp": (
            kg.testing.check_vjp,
            {"fun": ops.sin, "primals": (VECTOR,)},
            "fun: function, primals: structure, rtol: number?, atol: number?, step: number?, seed: seed",
        ),
        "check_gradients": (
            kg.testing.check_gradients,
            {"fun": ops.sin, "args": (VECTOR,), "order": 1},
            "fun: function, args: structure, order: choice, modes: choice, seed: seed",
        ),
        "check_hvp": (
            kg.testing.check_hvp,
            {"fun": square, "primals": (VECTOR,)},
            "fun: function, primals: structure, tangents: structure?, seed: seed",
        ),
        "imshow_zero_center": (
            pl.imshow_zero_center,
            {"image": np.eye(3)},
            "image: picture, limit: number?, colorbar: flag",
        ),
        "plot_as_patches": (
            pl.plot_as_patches,
            {"jacobian": np.ones((2, 2, 2, 2))},
            "jacobian: picture, patch_axes: axes?, pad: count from 0",
        ),
        "plot_jacobians": (
            pl.plot_jacobians,
            {"jacobians": {"a": np.ones((2, 2, 2))}},
            "jacobians: structure, patch_axes: axes?, pad: count from 0",
        ),
        "plot_hessian": (pl.plot_hessian, {"hessian": np.eye(3)}, "hessian: picture, blocks: model?"),
        "plot_spectral_density": (pl.plot_spectral_density, {"density": density}, "density: model, floor: number"),
        "plot_eigenvalue_history": (
            pl.plot_eigenvalue_history,
            {"history": {"eigenvalue_max": [1.0, 2.0], "eigenvalue_min": [0.0, 1.0]}},
            "history: history, keys: quantities?",
        ),
        "plot_loss_surface": (pl.plot_loss_surface, {"surface": surface}, "surface: model, levels: count"),
        "plot_singular_values": (pl.plot_singular_values, {"spectra": [np.ones((2, 3))]}, "spectra: structure"),
        "plot_gradient_flow": (
            pl.plot_gradient_flow,
            {"layers": {"a": [1.0], "b": [2.0]}},
            "layers: structure, quantity: choice",
        ),
        "plot_penalty_weight_sweep": (pl.plot_penalty_weight_sweep, {"sweep": sweep}, "sweep: model"),
        "plot_robustness": (pl.plot_robustness, {"report": report}, "report: model"),
    }
