"""The tape inside compiled functions, around them, and with control flow in Python and in `keras.ops`."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.compilers import with_every_compiler, with_unknown_batch

X = np.array([[0.5, -1.0], [2.0, 0.25], [1.5, 3.0]])
V = np.array([[1.0, 2.0], [-1.0, 0.5], [3.0, -2.0]])


def cube(x):
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = x * x * x
    return tape, y


def by_gradient(x):
    tape, y = cube(x)
    return tape.gradient(y, x, output_gradients=tensor(V))


def by_jvp(x):
    tape, y = cube(x)
    return tape.jvp(y, x, tensor(V))


def by_jacobian(x, chunk_size=None):
    row = x[0]
    tape, y = cube(row)
    return tape.jacobian(y, row, chunk_size=chunk_size)


def by_batch_jacobian(x, chunk_size=None):
    tape, y = cube(x)
    return tape.batch_jacobian(y, x, chunk_size=chunk_size)


def hessian(x):
    with kg.GradientTape() as outer:
        outer.watch(x)
        tape, y = cube(x)
        slope = tape.gradient(y, x)
    return outer.batch_jacobian(slope, x)


def third_derivative(x):
    tapes = [kg.GradientTape() for _ in range(2)]
    with tapes[0]:
        tapes[0].watch(x)
        with tapes[1]:
            tapes[1].watch(x)
            tape, y = cube(x)
            first = tape.gradient(y, x)
        second = tapes[1].gradient(first, x)
    return tapes[0].gradient(second, x)


def own_calls(x):
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        slope = tape.gradient(x * x * x, x)
    return tape.gradient(slope, x)


def paused(x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        with tape.stop_recording():
            square = x * x
        y = square * x
    return tape.gradient(y, x)


def reset(x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        square = x * x
        tape.reset()
        tape.watch(x)
        y = square * x
    return tape.gradient(y, x)


def re_entered(x):
    tape, _ = cube(x)
    with tape:
        y = x * x
    return tape.gradient(y, x)


def unchanged(x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * ops.stop_gradient(x) * ops.cast(x, x.dtype)
    return tape.gradient(y, x)


def unconnected(x):
    tape, y = cube(x)
    other = x + 1.0
    assert tape.gradient(y, other) is None
    return tape.gradient(y, other, unconnected_gradients="zero")


def python_loop(x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x
        for k in range(3):
            y = y * x if k % 2 else y + x
    return tape.gradient(y, x)


def control_flow(body):
    """The gradient of `body(x)`, a function written with control flow from `keras.ops`."""

    def program(x):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = body(x)
        return tape.gradient(y, x)

    return program


def diagonal(x):
    return np.einsum("bi,ij->bij", x, np.eye(2))


PROGRAMS = {
    "gradient": (by_gradient, 3 * X**2 * V),
    "jvp": (by_jvp, 3 * X**2 * V),
    "jacobian": (by_jacobian, np.diag(3 * X[0] ** 2)),
    "jacobian in chunks": (lambda x: by_jacobian(x, 1), np.diag(3 * X[0] ** 2)),
    "batch_jacobian": (by_batch_jacobian, diagonal(3 * X**2)),
    "batch_jacobian in chunks": (lambda x: by_batch_jacobian(x, 1), diagonal(3 * X**2)),
    "hessian": (hessian, diagonal(6 * X)),
    "third derivative": (third_derivative, 6 + 0 * X),
    "own calls": (own_calls, 6 * X),
    "stop_recording": (paused, X**2),
    "reset": (reset, X**2),
    "re-entered": (re_entered, 2 * X),
    "unchanged values": (unchanged, 2 * X**2),
    "unconnected": (unconnected, 0 * X),
    "loop in Python": (python_loop, 4 * X + 1),
    "cond": (
        control_flow(lambda x: ops.cond(ops.sum(x) > 0, lambda: x * x, lambda: -x)),
        2 * X,
    ),
    "switch": (
        control_flow(lambda x: ops.switch(1, [lambda x: -x, lambda x: x**3, lambda x: x], x)),
        3 * X**2,
    ),
    "vectorized_map": (
        control_flow(lambda x: ops.vectorized_map(lambda row: ops.sum(row) * row, x)),
        2 * X.sum(1, keepdims=True) + 0 * X,
    ),
    "map": (
        control_flow(lambda x: ops.map(lambda row: row * row, x)),
        2 * X,
    ),
    "where": (
        control_flow(lambda x: ops.where(x > 0, x * x, 0.0)),
        np.where(X > 0, 2 * X, 0),
    ),
}


@with_every_compiler
@pytest.mark.parametrize("name", PROGRAMS)
def test_inside(name, compiler):
    program, expected = PROGRAMS[name]
    compiled = compiler.compile(program)
    for _ in range(2):
        # Twice, for the second call runs what the first has compiled.
        close(compiled(tensor(X)), expected)


def power_by_scan(x):
    return ops.scan(lambda carry, _: (carry * x, carry), x, length=2)[0]


def power_by_fori_loop(x):
    return ops.fori_loop(0, 2, lambda i, y: y * x, x)


def power_by_while_loop(x):
    return ops.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, y * x), (0, x))[1]


def power_by_bounded_while_loop(x):
    return ops.while_loop(lambda i, y: i < 9, lambda i, y: (i + 1, y * x), (0, x), maximum_iterations=2)[1]


LOOPS = [power_by_scan, power_by_fori_loop, power_by_while_loop, power_by_bounded_while_loop]


@with_every_compiler
@pytest.mark.parametrize("loop", LOOPS)
def test_loops(loop, compiler, backend):
    compiled = compiler.compile(control_flow(loop))
    if backend == "jax" and "while" in loop.__name__:
        # JAX keeps no intermediate values of a loop whose length it does not know.
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            compiled(tensor(X))
    elif compiler.is_xla_graph and loop is not power_by_bounded_while_loop:
        pytest.skip("TensorFlow's XLA cannot reverse a loop without maximum_iterations")
    else:
        close(compiled(tensor(X)), 3 * X**2)


@with_every_compiler
@pytest.mark.parametrize("loop", LOOPS)
def test_jvp_of_loops(loop, compiler, backend):
    def program(x):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = loop(x)
        return tape.jvp(y, x, tensor(V))

    if compiler.is_xla_graph and loop is not power_by_bounded_while_loop:
        pytest.skip("TensorFlow's XLA cannot reverse a loop without maximum_iterations")
    close(compiler.compile(program)(tensor(X)), 3 * X**2 * V)


def dense():
    layer = keras.layers.Dense(1, use_bias=False)
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [2.0]])
    return layer


def kernel_gradient(layer, x):
    """The gradient of the summed squares by the kernel, 2 X'X w."""
    with kg.GradientTape() as tape:
        y = ops.square(layer(x))
    assert [id(v) for v in tape.watched_variables()] == [id(layer.kernel)]
    return tape.gradient(y, layer.kernel)


@with_every_compiler
def test_variables_read_inside(compiler):
    layer = dense()
    compiled = compiler.compile(lambda x: kernel_gradient(layer, x))
    for w in ([[1.0], [2.0]], [[-3.0], [0.5]]):
        layer.kernel.assign(w)
        close(compiled(tensor(X)), 2 * X.T @ X @ np.array(w))
        if not compiler.sees_assignments:
            break


@with_every_compiler
def test_a_tape_around(compiler):
    """The tape outside, the computation compiled: what is passed in is followed, at every call."""
    compiled = compiler.compile(lambda x: x * x * x)
    for _ in range(3):
        x = tensor(X)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = compiled(x) * x
        close(tape.gradient(y, x), 4 * X**3)
        close(tape.batch_jacobian(y, x), diagonal(4 * X**3))


@with_every_compiler
def test_a_tape_around_sees_the_variables_inside(compiler):
    if not compiler.sees_assignments:
        pytest.skip("jax.jit hides the variables that it closes over: pass their values, or use kg.jit")
    layer = dense()
    compiled = compiler.compile(lambda x: ops.square(layer(x)))
    for w in ([[1.0], [2.0]], [[-3.0], [0.5]]):
        layer.kernel.assign(w)
        with kg.GradientTape() as tape:
            y = compiled(tensor(X))
        close(tape.gradient(y, layer.kernel), 2 * X.T @ X @ np.array(w))


@with_every_compiler
@pytest.mark.parametrize("trainable_at_first", [True, False])
def test_freezing_between_calls(compiler, trainable_at_first):
    if not compiler.sees_assignments:
        pytest.skip("jax.jit hides the variables that it closes over: pass their values, or use kg.jit")
    layer = dense()
    compiled = compiler.compile(lambda x: ops.square(layer(x)))
    for trainable in (trainable_at_first, not trainable_at_first, trainable_at_first):
        layer.trainable = trainable
        with kg.GradientTape() as tape:
            y = compiled(tensor(X))
        expected = 2 * X.T @ X @ np.array([[1.0], [2.0]])
        close(tape.gradient(y, layer.kernel), expected if trainable else None)


@with_every_compiler
def test_second_order_across_the_border(compiler):
    """One derivative taken inside the compiled function, the next one outside."""
    compiled = compiler.compile(by_gradient)
    x = tensor(X)
    with kg.GradientTape() as tape:
        tape.watch(x)
        slope = compiled(x)
    close(tape.gradient(slope, x), 6 * X * V)


@with_every_compiler
def test_an_error_while_compiling_leaves_no_tape(compiler):
    def broken(x):
        with kg.GradientTape() as tape:
            tape.watch(x)
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        compiler.compile(broken)(tensor(X))
    close(compiler.compile(by_gradient)(tensor(X)), 3 * X**2 * V)


@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_batch_of_unknown_size(batch, chunk_size):
    def program(x):
        tape, y = cube(x)
        return (
            tape.gradient(y, x),
            tape.jvp(y, x, x),
            tape.batch_jacobian(y, x, chunk_size=chunk_size),
            tape.gradient(y, x + 1.0, unconnected_gradients="zero"),
        )

    x = X[:batch]
    results = with_unknown_batch(program, (2,))(tensor(x))
    close(results, (3 * x**2, 3 * x**3, diagonal(3 * x**2), 0 * x))


def test_the_jacobian_of_a_batch_of_unknown_size():
    def program(x):
        tape, y = cube(x)
        return tape.jacobian(y, x)

    expected = np.einsum("bi,bc,ij->bicj", 3 * X**2, np.eye(3), np.eye(2))
    close(with_unknown_batch(program, (2,))(tensor(X)), expected)


def test_an_empty_batch_of_unknown_size():
    def program(x):
        tape, y = cube(x)
        return tape.gradient(y, x), tape.batch_jacobian(y, x)

    close(with_unknown_batch(program, (2,))(tensor(X[:0])), (np.zeros((0, 2)), np.zeros((0, 2, 2))))


def test_jit_sees_the_variables_that_each_shape_reads():
    a, b = keras.Variable(1.0), keras.Variable(1.0)
    scaled_sum = kg.jit(lambda x: ops.sum(x * (a if x.shape[0] > 2 else b)))
    scaled_sum(tensor(np.ones(3)))
    scaled_sum(tensor(np.ones(2)))
    b.assign(10.0)
    with kg.GradientTape() as tape:
        y = scaled_sum(tensor(np.ones(2)))
    close([y, tape.gradient(y, b)], [20.0, 2.0])


def test_jit_assigns_what_each_shape_assigns():
    counter = keras.Variable(0.0)

    @kg.jit
    def count_long(x):
        if x.shape[0] > 2:
            counter.assign_add(1.0)
        return ops.sum(x)

    for n in (3, 2, 3):
        count_long(tensor(np.ones(n)))
    close(counter.value, 2.0)


def test_a_normalization_that_was_compiled_before_the_tape():
    layer = keras.layers.LayerNormalization()
    layer.build((2, 4))
    x, w = tensor([[1.0, 2.0, 4.0, 3.0], [0.0, 1.0, -1.0, 2.0]]), tensor(np.arange(8.0).reshape(2, 4))

    def curvature(fun):
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = fun(x)
            energy = ops.sum(inner.gradient(y, x) * w)
        return ops.convert_to_numpy(outer.gradient(energy, x))

    def cubed(x):
        return ops.sum(layer(x) ** 3)

    compiled = kg.jit(cubed)
    compiled(x)
    close(curvature(compiled), curvature(cubed), rtol=1e-4, atol=1e-4)


def test_jit_of_no_function():
    with pytest.raises(ValueError, match="jit takes a function. Received: 3"):
        kg.jit(3)
