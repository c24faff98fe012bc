"""The errors that a newcomer meets first name the mistake and what to write instead."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg

X, Y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")


def model(activation="tanh"):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation)])


def compiled(wrapper, optimizer="sgd"):
    wrapper.compile(optimizer, "mse")
    return wrapper


def test_gradient_with_respect_to_a_model_names_its_variables():
    m = model()
    with kg.GradientTape() as tape:
        loss = ops.sum(m(X))
    with pytest.raises(ValueError, match=r"Received: <Sequential.*`model\.trainable_variables`"):
        tape.gradient(loss, m)


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.layers[0], lambda m: [m.layers[0].kernel, m.layers[0]]])
def test_watching_a_model_or_a_layer_names_its_variables(of):
    with kg.GradientTape() as tape, pytest.raises(ValueError, match=r"`model\.trainable_variables`"):
        tape.watch(of(model()))


def test_numpy_in_a_block_names_keras_ops(backend):
    x = ops.convert_to_tensor(X)
    with pytest.raises((ValueError, RuntimeError)) as caught, kg.GradientTape() as tape:
        tape.watch(x)
        y = np.sin(x)
        tape.gradient(y, x)
    told = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert "`keras.ops`" in told[-1] and "NumPy" in told[-1]


def test_numpy_under_a_transform_names_keras_ops(backend):
    if backend != "torch":
        pytest.skip("only torch refuses NumPy on a tensor: on the others the result is a constant")
    with pytest.raises(RuntimeError, match="requires grad") as caught:
        kg.grad(lambda x: ops.sum(np.sin(x)))(ops.convert_to_tensor(X))
    (note,) = caught.value.__notes__
    assert "`keras.ops`" in note and "constant" in note


@pytest.mark.parametrize("transform", [kg.grad, kg.value_and_grad, kg.hessian, kg.jacobian])
def test_a_function_without_arguments_names_functionalize(transform):
    with pytest.raises(ValueError, match=r"0 positional arguments.*`kg\.functionalize`"):
        transform(lambda: ops.sum(model()(X)))()


TRANSFORMS = [kg.grad, kg.value_and_grad, kg.hessian, kg.jacobian, kg.per_example_grad]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("x", [X, [1.0, 2.0]], ids=["array", "list"])
def test_the_argument_in_the_place_of_argnums(transform, x):
    with pytest.raises(ValueError, match=rf"argnums.*`{transform.__name__}\(fun\)\(x\)`"):
        transform(model(), x)


@pytest.mark.parametrize("operator", [kg.laplacian, kg.divergence], ids=lambda f: f.__name__)
def test_the_argument_in_the_place_of_axes(operator):
    with pytest.raises(ValueError, match=rf"axes.*`{operator.__name__}\(fun\)\(x\)`"):
        operator(model(), X)


def test_the_argument_in_the_place_of_the_mode():
    with pytest.raises(ValueError, match=r"mode.*`batch_jacobian\(fun\)\(x\)`"):
        kg.batch_jacobian(model(), X)


POINT = ops.ones((3,))
NAMED = {
    "hessian": lambda fun: kg.hessian(fun)(POINT),
    "hvp": lambda fun: kg.hvp(fun, (POINT,), (POINT,)),
    "ggnvp": lambda fun: kg.ggnvp(lambda x: x, fun, (POINT,), (POINT,)),
    "laplacian": lambda fun: kg.laplacian(lambda x: fun(x[0]))(POINT[None]),
    "divergence": lambda fun: kg.divergence(lambda x: fun(x[0]))(POINT[None]),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("fun", [lambda x: "text", lambda x: x > 0])
def test_an_error_names_the_transform_that_was_called(name, fun):
    with pytest.raises(ValueError, match=rf"`{name}`|^{name} "):
        NAMED[name](fun)


def test_a_vector_under_hvp():
    with pytest.raises(ValueError, match="function under `hvp` must return one scalar"):
        kg.hvp(lambda x: x, (POINT,), (POINT,))


@pytest.mark.parametrize("operator", [kg.curvature.Hessian, kg.curvature.GaussNewton, kg.curvature.Fisher])
def test_the_name_of_an_unknown_loss_fails_at_once(operator):
    with pytest.raises(ValueError, match=rf"{operator.__name__} expects a `loss`.*loss='typo'"):
        operator(model(), "typo", (X, Y))


def test_a_branch_under_jit(backend):
    @kg.jit
    def branch(x):
        return x if ops.sum(x) > 0 else -x

    if backend == "torch":  # where functions run eagerly
        np.testing.assert_array_equal(ops.convert_to_numpy(branch(X)), X)
        return
    for _ in range(2):
        with pytest.raises(TypeError, match=r"`kg\.jit` cannot compile branch.*`keras\.ops\.where`.*The error was"):
            branch(ops.convert_to_tensor(X))


def test_a_branch_under_jit_in_a_transform_runs_eagerly(backend):
    def branch(x):
        return ops.sum(x) if ops.sum(x) > 0 else -ops.sum(x)

    if backend != "torch":
        with pytest.raises(TypeError, match=r"`kg\.jit` cannot compile branch"):
            kg.grad(kg.jit(branch))(ops.convert_to_tensor(X))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: kg.callbacks.GradientMonitor((X, Y), log_dir=folder),
        lambda folder: kg.callbacks.Monitor(log_dir=folder),
    ],
)
def test_a_missing_tensorboardx_is_named_before_training(make, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'Monitor writes to `log_dir`.*pip install "keras-gradtools\[tensorboard\]"'):
        make(tmp_path)


WRAPPERS = {
    "InputGradientRegularized": lambda: compiled(kg.models.InputGradientRegularized(model(), 0.1)),
    "AdversarialTraining": lambda: compiled(kg.models.AdversarialTraining(model(), kg.attacks.FGSM(0.1))),
    "SecondOrder": lambda: compiled(kg.models.SecondOrder(model()), kg.optimizers.NewtonCG()),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_fit_without_labels(name):
    with pytest.raises(ValueError, match=rf"{name} trains on labels. Received: .*`y`"):
        WRAPPERS[name]().fit(X, verbose=0)


@pytest.mark.parametrize("name", WRAPPERS)
def test_evaluate_without_labels(name):
    with pytest.raises(ValueError, match=rf"{name} .* labels. Received: .*`y`"):
        WRAPPERS[name]().evaluate(X, verbose=0)


def test_a_loss_of_the_outputs_alone_needs_no_labels():
    layer = keras.layers.Dense(2, activity_regularizer="l2")
    wrapper = kg.models.InputGradientRegularized(keras.Sequential([keras.Input((3,)), layer]), 0.1, "outputs")
    wrapper.compile("sgd")
    assert np.isfinite(wrapper.fit(X, verbose=0).history["input_gradient_norm"]).all()


@pytest.mark.parametrize(
    "data", [(X, Y[:2]), [(X, Y, None, None)], (X, np.array(["a"] * 4)), (X[:0], Y[:0])], ids=lambda d: len(d)
)
def test_errors_of_the_monitor_of_curvature_name_it(data):
    m = compiled(model())
    with pytest.raises(ValueError, match="CurvatureMonitor"):
        m.fit(X, Y, verbose=0, callbacks=[kg.callbacks.CurvatureMonitor(data)])


@pytest.mark.parametrize("estimate", [kg.curvature.trace, kg.curvature.diagonal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("matvecs", [6, 99])
def test_estimates_of_a_matrix_with_nan_raise_as_eigsh_does(estimate, matvecs):
    matrix = np.eye(8)
    matrix[2, 2] = np.nan
    with pytest.raises(FloatingPointError, match="not finite. Received: NaN or infinity"):
        estimate(matrix, matvecs)
