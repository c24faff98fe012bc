"""Forward mode on TensorFlow, by the pullback of a pullback."""

import time

import tensorflow as tf

from keras_gradtools.backend.tensorflow.native_tape import NativeTape
from keras_gradtools.backend.tensorflow.pullbacks import dense, gradients_of
from keras_gradtools.backend.tensorflow.vectorize import loop_connected, map_connected, pays
from keras_gradtools.keras_state import recording


def pushforward_batch(tape, targets, sources, tangents):
    if not pays(tangents, (*targets, *sources)):
        return loop_connected(linearize(tape, targets, sources), tangents)
    return map_connected(lambda rows: linearize(tape, targets, sources)(rows), tangents)


def linearize(tape, targets, sources, is_symmetric=False):
    # A pullback is linear in its cotangents, so its own pullback is the pushforward. A `ForwardAccumulator` cannot be
    # used: it would have to be active while the block runs, and nested ones are silently wrong.
    _, values, places = tape.spread(sources, range(len(sources)))
    if not values:
        return lambda tangents: [None] * len(targets)
    cotangents = [tf.zeros_like(t) for t in targets]
    transposed = NativeTape(persistent=True, watch_accessed_variables=True)
    with transposed, transposed:
        transposed.tape.watch(cotangents)
        gradients = gradients_of(tape, targets, values, cotangents)
    connected = [(g, place) for g, place in zip(gradients, places, strict=True) if g is not None]

    def push(tangents):
        if not connected:
            return [None] * len(targets)
        upstream = [tangents[place] for _, place in connected]
        return dense(transposed.tape.gradient([g for g, _ in connected], cotangents, output_gradients=upstream))

    def push_as_a_graph(tangents):
        # The recorded values are inputs of the graph, so it computes only what depends on the tangents.
        return linearize(tape, targets, sources)(tangents)

    return _CompiledWhenItPays(push, push_as_a_graph) if tf.executing_eagerly() and connected else push


class _CompiledWhenItPays:
    """Runs a function eagerly until its calls have taken `TRACING` seconds in total, and as a graph from then on.

    A graph omits operations that eager backpropagation computes unnecessarily, but tracing takes as long as many small
    products. `TRACING` is about that time.
    """

    TRACING = 0.3

    def __init__(self, eager, traced):
        self._eager = eager
        self._traced = tf.function(traced, autograph=False)
        # There is one for each linearization, so TensorFlow's warning would be of no use.
        self._traced._omit_frequent_tracing_warning = True
        self._seconds = 0.0

    def __call__(self, tensors):
        if recording.active_tapes() or not tf.executing_eagerly():
            return self._eager(tensors)
        if self._seconds > self.TRACING:
            return self._traced(tensors)
        start = time.perf_counter()
        result = self._eager(tensors)
        self._seconds += time.perf_counter() - start
        return result
