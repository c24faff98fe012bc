"""What the tape refuses, in which words, and that nothing is left half-recorded afterwards."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools.keras_state.recording import active_tapes
from tests.cases import close, tensor

X = np.array([[1.0, 2.0], [3.0, 4.0]])

# name: (what is given, the pattern of the message)
NOT_DIFFERENTIABLE = {
    "numpy": (lambda: X, r"tensor of the backend.*Received: a ndarray of dtype float64 and shape \(2, 2\).*convert"),
    "float": (lambda: 3.0, r"tensor of the backend.*Received: 3\.0 \(of type builtins\.float\).*convert_to_tensor"),
    "str": (lambda: "x", r"tensor of the backend.*Received: 'x' \(of type builtins\.str\)"),
    "none": (lambda: None, r"tensor of the backend.*Received: None"),
    "layer": (lambda: keras.layers.Dense(1), r"tensor of the backend.*Received: <Dense"),
    "integer": (
        lambda: ops.convert_to_tensor([1, 2]),
        r"real and floating-point.*dtype int(32|64) and shape \(2,\).*Only floating-point.*cast",
    ),
    "boolean": (lambda: ops.convert_to_tensor([True]), r"real and floating-point.*dtype bool.*cast"),
    "complex": (
        lambda: ops.convert_to_tensor(np.array([1j], "complex64")),
        r"real and floating-point.*dtype complex64 and shape \(1,\).*Complex values are not supported.*imaginary part",
    ),
    "integer variable": (
        lambda: keras.Variable(np.array([1, 2]), dtype="int32", trainable=False, name="steps"),
        r"real and floating-point.*keras\.Variable 'steps' of dtype int32 and shape \(2,\)",
    ),
    "symbolic": (lambda: keras.Input((3,)), r"Received: the symbolic KerasTensor.*A symbolic tensor has no values"),
}


def compressed():
    """Sparse and ragged tensors of the backend, by name."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return {"RaggedTensor": tf.ragged.constant([[1.0, 2.0], [3.0]]), "SparseTensor": tf.sparse.from_dense(X)}
    if keras.backend.backend() == "jax":
        from jax.experimental import sparse

        return {"BCOO": sparse.BCOO.fromdense(X), "BCSR": sparse.BCSR.fromdense(X)}
    import torch

    rows = [torch.ones(2), torch.ones(3)]
    return {
        "of layout torch.sparse_coo": torch.tensor(X).to_sparse(),
        "of layout torch.sparse_csr": torch.tensor(X).to_sparse_csr(),
        "of layout torch.jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", compressed())
def test_sparse_and_ragged_tensors(name):
    x = compressed()[name]
    if keras.backend.backend() == "tensorflow":
        # TensorFlow's tape watches the parts of such a tensor.
        with kg.GradientTape() as tape:
            tape.watch(x)
            z = ops.sum(ops.square(x.values))
        close(tape.gradient(z, x.values), 2 * x.values.numpy())
    else:
        pattern = rf"What a GradientTape watches must be dense.*Received: .*{name}.*values"
        with kg.GradientTape() as tape, pytest.raises(ValueError, match=pattern):
            tape.watch(x)
    tape, _, y = recorded()
    with pytest.raises(ValueError, match=rf"A source of GradientTape.gradient must be dense.*Received: .*{name}"):
        tape.gradient(y, x)
    for transform in (kg.grad, kg.hessian, lambda fun: lambda x: kg.jvp(fun, (x,), (x,))):
        with pytest.raises(ValueError, match=rf"Argument 0 under `\w+` must be dense.*Received: .*{name}"):
            transform(lambda x: 1.0)(x)


def recorded():
    tape = kg.GradientTape()
    x = tensor(X)
    with tape:
        tape.watch(x)
        y = x * x
    return tape, x, y


# These may stand beside what has a derivative.
CONSTANT = ("none", "integer", "boolean", "integer variable")


@pytest.mark.parametrize(
    ("name", "nested"),
    [(name, nested) for name in NOT_DIFFERENTIABLE for nested in (False, True) if not (nested and name in CONSTANT)],
)
def test_watch(name, nested):
    make, message = NOT_DIFFERENTIABLE[name]
    x, v = tensor(3.0), keras.Variable(2.0, trainable=False)
    with kg.GradientTape() as tape:
        with pytest.raises(ValueError, match="(?s)What a GradientTape watches must be.*" + message):
            tape.watch([x, v, {"bad": make()}] if nested else make())
        y = x * v
    # Not even what stood before the bad entry is watched.
    assert tape.watched_variables() == ()
    close(tape.gradient(y, [x, v]), [None, None])


@pytest.mark.parametrize("name", CONSTANT)
def test_a_nesting_of_constants_alone(name):
    make, message = NOT_DIFFERENTIABLE[name]
    tape, x, y = recorded()
    for call in (lambda: tape.gradient(y, [make()]), lambda: tape.gradient({"y": make()}, x)):
        with pytest.raises(ValueError, match="(?s)GradientTape.gradient must be.*" + message):
            call()


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
@pytest.mark.parametrize("method", ["gradient", "jvp", "jacobian", "batch_jacobian"])
@pytest.mark.parametrize("role", ["target", "source"])
def test_targets_and_sources(name, method, role):
    make, message = NOT_DIFFERENTIABLE[name]
    tape, x, y = recorded()
    target, source = (make(), x) if role == "target" else (y, make())
    with pytest.raises(ValueError, match=f"(?s)(The|A) {role} of GradientTape.{method} must be.*{message}"):
        getattr(tape, method)(target, source, *([tensor(X)] if method == "jvp" else []))
    close(tape.gradient(y, x), 2 * X)


# name: (the call, the error, the pattern of the message)
BAD_CALLS = {
    "unconnected_gradients": (
        lambda tape, x, y: tape.gradient(y, x, unconnected_gradients="zeros"),
        r"expects 'none' or 'zero' as `unconnected_gradients`\. Received: unconnected_gradients='zeros'",
    ),
    "unconnected_gradients of a jacobian": (
        lambda tape, x, y: tape.jacobian(y, x, unconnected_gradients=None),
        r"expects 'none' or 'zero' as `unconnected_gradients`\. Received: unconnected_gradients=None",
    ),
    "output_gradients of another shape": (
        lambda tape, x, y: tape.gradient(y, x, tensor([1.0, 2.0])),
        r"output_gradients must have the shape of.*`target`, \(2, 2\)\. Received: a .*float32 and shape \(2,\)",
    ),
    "output_gradients of another structure": (
        lambda tape, x, y: tape.gradient([y, y], x, [y]),
        r"output_gradients must have the structure of `target`\. Expected the structure.*Received: \['\*'\]",
    ),
    "tangents of another shape": (
        lambda tape, x, y: tape.jvp(y, x, tensor([1.0, 2.0])),
        r"tangents must have the shape of.*`sources`, \(2, 2\)\. Received: a .*float32 and shape \(2,\)",
    ),
    "tangents of another structure": (
        lambda tape, x, y: tape.jvp(y, [x], {"x": x}),
        r"tangents must have the structure of `sources`\. Expected the structure.*Received: \{'x': '\*'\}",
    ),
    "a nested target of a jacobian": (
        lambda tape, x, y: tape.jacobian([y], x),
        r"GradientTape\.jacobian takes one target tensor\. Received: a list\..*persistent",
    ),
    "a nested target of a batch jacobian": (
        lambda tape, x, y: tape.batch_jacobian({"y": y}, x),
        r"GradientTape\.batch_jacobian takes one target tensor\. Received: a dict\..*persistent",
    ),
    "a target of rank 1": (
        lambda tape, x, y: tape.batch_jacobian(y[0], x),
        r"batch_jacobian needs a target of shape \(batch, \.\.\.\).*rank 2 or more.*shape \(2,\).*expand_dims",
    ),
    "a source of rank 0": (
        lambda tape, x, y: tape.batch_jacobian(y, x[0, 0]),
        r"batch_jacobian needs a source of shape \(batch, \.\.\.\).*rank 2 or more.*shape \(\).*expand_dims",
    ),
    "batch sizes that differ": (
        lambda tape, x, y: tape.batch_jacobian(y[:1], x),
        r"same batch size in target and source\. Received: a target of shape \(1, 2\) and a source of shape \(2, 2\)",
    ),
    **{
        f"chunk_size {size!r} of {method}": (
            lambda tape, x, y, size=size, method=method: getattr(tape, method)(y, x, chunk_size=size),
            rf"{method} expects a positive integer, or None, as `chunk_size`\. Received: chunk_size={size!r}",
        )
        for size in (0, -1, 2.0, True, "auto")
        for method in ("jacobian", "batch_jacobian")
    },
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, message = BAD_CALLS[name]
    tape, x, y = recorded()
    with pytest.raises(ValueError, match="(?s)" + message):
        call(tape, x, y)
    # The refused call has not used the tape up.
    close(tape.gradient(y, x), 2 * X)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_inside_the_block_leave_the_tape_recording(name):
    call, message = BAD_CALLS[name]
    x = tensor(X)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
        with pytest.raises(ValueError, match="(?s)" + message):
            call(tape, x, y)
        z = y * x
    close(tape.gradient(z, x), 3 * X**2)


@pytest.mark.parametrize("method", ["watch", "reset", "stop_recording"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_outside_the_block(method, when):
    tape, x, y = (kg.GradientTape(), None, None) if when == "before" else recorded()
    message = "tape that is not recording" if method == "stop_recording" else f"{method} was called outside"
    with pytest.raises(RuntimeError, match=f"(?s){message}.*(Call it inside)"):
        if method == "stop_recording":
            with tape.stop_recording():
                pass
        else:
            getattr(tape, method)(*([tensor(1.0)] if method == "watch" else []))
    if when == "after":
        close(tape.gradient(y, x), 2 * X)


def test_stop_recording_inside_itself():
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        with tape.stop_recording():
            with pytest.raises(RuntimeError, match="not recording"), tape.stop_recording():
                pass
            square = x * x
        y = square * x
    close(tape.gradient(y, x), 9)


def test_entering_a_tape_inside_itself():
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        with (
            pytest.raises(ValueError, match="(?s)already recording.*Use a second tape.*or leave the block"),
            tape,
        ):
            pytest.fail("entered")
        assert len(active_tapes()) == 1
        y = x * x
    close(tape.gradient(y, x), 6)


def test_a_second_call_without_persistent():
    tape, x, y = recorded()
    tape.gradient(y, x)
    with pytest.raises(RuntimeError, match=r"(?s)already been used.*GradientTape\(persistent=True\)"):
        tape.gradient(y, x)


def test_a_tape_that_was_never_entered_connects_nothing():
    x, v = tensor(3.0), keras.Variable(2.0)
    y = x * v
    close(kg.GradientTape().gradient(y, [x, v]), [None, None])
    close(kg.GradientTape().gradient(y, x, unconnected_gradients="zero"), 0)
    close(kg.GradientTape().jacobian(y, [x, v]), [None, None])
    close(kg.GradientTape().jvp(y, x, tensor(1.0)), None)


@pytest.mark.parametrize("given", ["abc", object()])
def test_output_gradients_of_no_kind(given):
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    with pytest.raises(ValueError, match="output_gradients must be a tensor, an array or a number. Received"):
        tape.gradient(y, x, output_gradients=given)
