"""Double precision in all operations of Keras."""

from keras_gradtools import backend
from keras_gradtools.blocks import Block
from keras_gradtools.keras_state import precision


class double_precision(Block):  # noqa: N801 - used as a function
    """A block in which Keras computes in double precision: `with kg.double_precision():`.

    `keras.config.set_floatx("float64")` alone is not enough. On JAX and torch, products, means and many activations of
    Keras then still return float32, and round float64 models to single precision without an error. In the block, they
    return float64. New layers, models, optimizers, losses and metrics are in float64, and `fit` converts data to it.
    Everything is restored afterwards: `keras.config.floatx`, the dtype policy and the dtypes of results.

    Build the model, compile it, train it and use it inside the block. A step that Keras has already compiled outside of
    it is not compiled again, so call `compile` inside. If a float64 model is called after the block, JAX and torch
    round it to single precision as before. The block applies to all threads of the process. Layers or functions that
    convert to float32 themselves still do so.

    On JAX, double precision has to be enabled at the start, by the environment variable `JAX_ENABLE_X64=1` or by
    `jax.config.update("jax_enable_x64", True)` before anything is computed.

    Raises:
        RuntimeError: On JAX, if it has no double precision.

    Cost:
        None by itself. On CPUs, float64 takes about twice the time and memory of float32, and on most GPUs far more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> with kg.double_precision():  # doctest: +SKIP
    ...     x = ops.convert_to_tensor([[1.0, 1e-12]])
    ...     y = ops.sum(ops.matmul(x, ops.ones((2, 1)))) - 1.0
    >>> float(y)  # doctest: +SKIP
    1.000088900582341e-12
    """

    _before: precision.Precision | None = None

    def __init__(self) -> None:
        reason = backend.why_single_precision()
        if reason is not None:
            raise RuntimeError(
                f"double_precision needs a framework that computes in double precision. Received: {reason}."
            )

    def begin(self) -> None:
        self._before = precision.current()
        precision.restore(precision.DOUBLE)

    def end(self) -> None:
        if self._before is not None:
            precision.restore(self._before)
