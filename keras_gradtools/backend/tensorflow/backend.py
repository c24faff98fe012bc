"""The kernels on TensorFlow, built on `tf.GradientTape`.

Some of TensorFlow's gradients are wrong or missing: `gradients.py`, `resizing.py`, `colors.py`, `elementwise.py`,
`keras_ops.py` and `closed_over.py` correct them.
"""

import tensorflow as tf

from keras_gradtools.backend.base import Backend
from keras_gradtools.backend.tensorflow import (
    backward_passes,
    closed_over,
    colors,
    elementwise,
    gradients,
    kept_programs,
    keras_ops,
    memory,
    pullbacks,
    pushforwards,
    replicas,
    resizing,
    steps,
    tape,
)
from keras_gradtools.backend.tensorflow.chunks import map_chunks
from keras_gradtools.backend.tensorflow.containers import containers
from keras_gradtools.backend.tensorflow.custom_gradient import custom_gradient
from keras_gradtools.backend.tensorflow.jit import depends_on_values, jit
from keras_gradtools.backend.tensorflow.per_example import per_example_gradients

tape.install()
backward_passes.install()
closed_over.install()
colors.install()
elementwise.install()
resizing.install()
gradients.install()
keras_ops.install()


class TensorFlowBackend(Backend):
    """The kernels on TensorFlow. A kernel that is a function of another file is a static method here."""

    Tape = tape.Tape

    COMPILERS = ("xla",)
    COMPILES_LOOPS = True

    pullback = staticmethod(pullbacks.pullback)
    constant_pullback = staticmethod(pullbacks.constant_pullback)
    pullback_batch = staticmethod(pullbacks.pullback_batch)
    kept = staticmethod(kept_programs.kept)
    pushforward_batch = staticmethod(pushforwards.pushforward_batch)
    linearize = staticmethod(pushforwards.linearize)
    operations = staticmethod(steps.Operations)
    steps_between = staticmethod(steps.steps_between)
    per_example_gradients = staticmethod(per_example_gradients)
    custom_gradient = staticmethod(custom_gradient)
    jit = staticmethod(jit)
    depends_on_values = staticmethod(depends_on_values)
    map_chunks = staticmethod(map_chunks)
    computed_bytes = staticmethod(memory.computed_bytes)
    containers = staticmethod(containers)
    train_function = staticmethod(replicas.train_function)
    can_step_directly = staticmethod(replicas.can_step_directly)
    is_shared_by_replicas = staticmethod(replicas.is_shared_by_replicas)
    summed_over_replicas = staticmethod(replicas.summed_over_replicas)
    replica_results = staticmethod(replicas.replica_results)

    def held(self, variable):
        # What has been read from a variable does not change, so it need not be copied.
        value = variable.value
        return value.value() if isinstance(value, tf.Variable) else tf.convert_to_tensor(value)

    def alias(self, x):
        return tf.identity(x)

    def may_compile(self):
        return tf.executing_eagerly()

    def tried(self, fun):
        def without_result():
            fun()

        tf.function(without_result, autograph=False).get_concrete_function()

    def threads(self):
        if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
            return None
        return tf.config.threading.get_intra_op_parallelism_threads() or super().threads()

    def eagerly(self):
        # Lifts the block out of the graph that is being built.
        return tf.init_scope()

    def can_make_variables(self):
        # Each replica would create a variable of its own.
        return tf.distribute.get_strategy().num_replicas_in_sync == 1 or tf.distribute.in_cross_replica_context()

    def assigns_at_once(self):
        return tf.executing_eagerly() and not tf.distribute.has_strategy()
