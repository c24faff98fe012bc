"""Times of compiled functions on torch over eager ones: `KERAS_BACKEND=torch python -m benchmarks.compiled_torch`.

Prints the median CPU time of an eager call, and how many times faster the recorded operations are, run one by one and,
with `--inductor`, compiled by inductor. The three are called in turn, in one process, on one thread.
"""

import argparse
import statistics
import time

import keras
from keras import layers, ops

import keras_gradtools as kg
from benchmarks import hand_written

CALLS = 25


def mlp():
    hidden = [layers.Dense(128, activation="tanh") for _ in range(2)]
    return keras.Sequential([layers.Input((32,)), *hidden, layers.Dense(10)]), (64, 32)


def conv_net():
    hidden = [layers.Conv2D(8, 3, activation="silu") for _ in range(2)]
    parts = [layers.Input((16, 16, 3)), *hidden, layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return keras.Sequential(parts), (16, 16, 16, 3)


def attention():
    x = keras.Input((16, 32))
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 8)(x, x))
    return keras.Model(x, layers.Dense(10)(layers.GlobalAveragePooling1D()(y))), (16, 16, 32)


def lstm():
    return keras.Sequential([layers.Input((8, 16)), layers.LSTM(32), layers.Dense(10)]), (16, 8, 16)


def works(model, labels):
    """The functions to compile, by name."""

    def loss(x):
        return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, model(x), from_logits=True))

    def batch_jacobian(x):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
        return tape.batch_jacobian(y, x)

    return {
        "gradient": kg.grad(loss),
        "exact penalty": kg.grad(lambda x: ops.sum(kg.grad(loss)(x) ** 2)),
        "hvp": lambda x: kg.hvp(loss, (x,), (x,))[0],
        "batch Jacobian": batch_jacobian,
    }


def milliseconds(functions, x):
    """The median CPU time of each function, called in turn."""
    times: list = [[] for _ in functions]
    for _ in range(CALLS):
        for fun, found in zip(functions, times, strict=True):
            start = time.process_time()
            fun(x)
            found.append(time.process_time() - start)
    return [1e3 * statistics.median(found) for found in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inductor", action="store_true", help="compiles with inductor too, for a few minutes")
    options = parser.parse_args()
    hand_written.module().use_one_thread()
    keras.utils.set_random_seed(0)
    for make in (mlp, conv_net, attention, lstm):
        model, shape = make()
        # As in evaluation, no result requires gradients.
        model.trainable = False
        x, labels = keras.random.normal(shape), keras.random.randint((shape[0],), 0, 10)
        for name, fun in works(model, labels).items():
            functions = [fun, kg.jit(fun)]
            if options.inductor:
                functions.append(kg.jit(fun, compiler="inductor"))
            for compiled in functions[1:]:
                for _ in range(3):
                    compiled(x)
            eager, *others = milliseconds(functions, x)
            ratios = "".join(f" {eager / other:6.1f}" for other in others)
            print(f"{make.__name__:10} {name:15} {eager:8.2f} ms{ratios}", flush=True)


if __name__ == "__main__":
    main()
