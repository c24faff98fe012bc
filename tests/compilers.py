"""The ways to run a function on this backend: eagerly, and under each compiler that it has."""

import functools
import typing

import keras
import pytest

import keras_gradtools as kg


class Compiler(typing.NamedTuple):
    name: str
    compile: typing.Callable
    sees_assignments: bool = True  # whether a variable is read again at every call
    is_xla_graph: bool = False  # TensorFlow's XLA cannot reverse a loop of unknown length


def _compilers():
    yield Compiler("eager", lambda fun: fun)
    if hasattr(kg, "jit"):
        yield Compiler("kg.jit", kg.jit)
    if keras.config.backend() == "jax":
        import jax

        yield Compiler("jax.jit", jax.jit, sees_assignments=False)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        yield Compiler("tf.function", tf.function)
        yield Compiler("xla", functools.partial(tf.function, jit_compile=True), is_xla_graph=True)


COMPILERS = list(_compilers())
with_every_compiler = pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: c.name)


def compiled_by(call):
    """The result of `call()`, after which a compiled function runs no Python: torch compiles at the second call."""
    result = call()
    return call() if keras.config.backend() == "torch" else result


def with_unknown_batch(fun, *shapes):
    """Compiles `fun` for any number of examples, where the backend has such a thing."""
    if keras.config.backend() != "tensorflow":
        return fun
    import tensorflow as tf

    return tf.function(fun, input_signature=[tf.TensorSpec((None, *shape)) for shape in shapes])
