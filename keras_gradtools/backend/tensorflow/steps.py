"""The operations of a graph of TensorFlow as steps of forward passes that carry several derivatives.

Only inside a graph: eagerly, TensorFlow's tapes do not show what they have recorded. Control flow, calls of other
graphs and custom gradients are not taken apart.
"""

import functools
import threading

import tensorflow as tf
from tensorflow.python.framework import ops

from keras_gradtools.backend import steps
from keras_gradtools.backend.tensorflow import linear_stacks
from keras_gradtools.backend.tensorflow.native_tape import NativeTape
from keras_gradtools.backend.tensorflow.pullbacks import dense
from keras_gradtools.backend.tensorflow.vectorize import map_rows
from keras_gradtools.backend.tensorflow.vjp import pulled_back
from keras_gradtools.blocks import Block


def _names(text):
    return frozenset(text.split())


# Linear in all active inputs together. Indices and conditions are integers or booleans, which are never active.
_LINEAR = _names(
    "Add AddN AddV2 AvgPool AvgPool3D BiasAdd BroadcastTo Cast ConcatV2 Cumsum EnsureShape ExpandDims GatherNd "
    "GatherV2 Identity IdentityN Imag MatrixBandPart MatrixDiag MatrixDiagPart MatrixDiagPartV3 MatrixDiagV3 Mean "
    "MirrorPad Neg Pack Pad PadV2 Real Reshape ReverseV2 Roll ScatterNd SelectV2 Slice Split SplitV Squeeze "
    "StridedSlice Sub Sum TensorScatterAdd TensorScatterUpdate Tile Transpose Unpack UnsortedSegmentSum"
)
_BILINEAR = _names(
    "BatchMatMul BatchMatMulV2 BatchMatMulV3 Conv2D Conv2DBackpropInput Conv3D DepthwiseConv2dNative Einsum MatMul Mul"
)
_ELEMENTWISE = _names(
    "Abs Acos Acosh Asin Asinh Atan Atan2 Atanh Ceil Cos Cosh Digamma DivNoNan Elu Erf Erfc Erfinv Exp Expm1 Floor "
    "Inv LeakyRelu Lgamma Log Log1p Maximum Minimum Pow RealDiv Reciprocal Relu Relu6 Rint Round Rsqrt Selu Sigmoid "
    "Sign Sin Sinh Softplus Softsign Sqrt Square SquaredDifference Tan Tanh Xdivy Xlogy"
)
_GENERAL = _names("LogSoftmax Max MaxPool Min Prod Softmax")
_PIECEWISE_LINEAR = _names(
    "Abs Ceil Floor LeakyRelu Max MaxPool Maximum Min Minimum Relu Relu6 Rint Round SelectV2 Sign"
)
_CLOSED_FORMS = {name.title(): name for name in ("cos", "cosh", "exp", "sigmoid", "sin", "sinh", "square", "tanh")}


class _Thread(threading.local):
    def __init__(self):
        self.blocks = []


_thread = _Thread()


class Operations(Block):
    """A block in which functions with a custom gradient of TensorFlow's own are computed without it."""

    def begin(self):
        _thread.blocks.append(self)

    def end(self):
        while self in _thread.blocks:
            _thread.blocks.remove(self)


def plain_silu(silu):
    """Keras' `silu`, in such a block as a product. TensorFlow's own has a custom gradient, to save memory."""

    @functools.wraps(silu)
    def call(x):
        if not _thread.blocks:
            return silu(x)
        x = tf.convert_to_tensor(x)
        return x * tf.sigmoid(x)

    return call


def steps_between(tape, operations, targets, sources):
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if graph is None or any(getattr(x, "graph", None) is not graph for x in (*targets, *sources)):
        return None
    found = _Steps(sources)
    try:
        for op in _between(graph, targets, sources):
            found.add(op)
    except _Unknown:
        return None
    return found.steps, [found.slots.get(id(t)) for t in targets], [found.slots[id(s)] for s in sources]


class _Unknown(Exception):
    """An operation that cannot be taken apart."""


def _between(graph, targets, sources):
    """The operations on which the targets depend, in the order of their creation, up to the sources."""
    ends = {s.op for s in sources}
    seen, stack = set(), [t.op for t in targets if t.op not in ends]
    while stack:
        op = stack.pop()
        if op in seen:
            continue
        seen.add(op)
        stack.extend(x.op for x in op.inputs if x.op not in ends and x.op not in seen and x.graph is graph)
    return sorted(seen, key=lambda op: op._id)


class _Steps:
    def __init__(self, sources):
        self.steps = []
        self.slots = {id(s): slot for slot, s in enumerate(sources)}
        self._alive = list(sources)

    def add(self, op):
        inputs = list(op.inputs)
        active = [i for i, x in enumerate(inputs) if id(x) in self.slots]
        if not active or _has_no_derivative(op):
            return
        if all(y.dtype.is_integer or y.dtype.is_bool for y in op.outputs):
            return
        # Complex tensors, and lists of tensors, are not taken apart.
        if any(not x.dtype.is_floating for x in (*(inputs[i] for i in active), *op.outputs)):
            raise _Unknown
        outputs = range(len(op.outputs))
        kind = _kind(op, active)
        if kind is None or "_gradient_op_type" in op.node_def.attr:
            raise _Unknown
        self.steps.append(
            _Step(
                op,
                kind,
                active,
                outputs,
                tuple(self.slots[id(inputs[i])] for i in active),
                tuple(self._slot(op.outputs[i]) for i in outputs),
            )
        )

    def _slot(self, x):
        self._alive.append(x)
        return self.slots.setdefault(id(x), len(self.slots))


def _has_no_derivative(op):
    if op.type in ("StopGradient", "Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"):
        return True
    try:
        return ops.get_gradient_function(op) is None
    except LookupError:
        return False


def _kind(op, active):
    count = len(active)
    if op.type in _LINEAR or op.type == "RealDiv" and active == [0]:
        return steps.LINEAR
    if op.type in _BILINEAR:
        if count == 1:
            return steps.LINEAR
        return steps.GENERAL if count > 2 else steps.PRODUCT if op.type == "Mul" else steps.BILINEAR
    if op.type in _ELEMENTWISE:
        x, y = op.inputs[active[0]], op.outputs[0]
        is_one = count == 1 and x.shape.rank is not None and _same_shape(x, y)
        return steps.ELEMENTWISE if is_one else steps.GENERAL
    return steps.GENERAL if op.type in _GENERAL else None


def _same_shape(x, y):
    """Whether two tensors are known to have the same shape. An unknown batch size is that of both."""
    return x.shape.rank == y.shape.rank and x.shape.as_list() == y.shape.as_list()


class _Step(steps.Step):
    def __init__(self, op, kind, active, outputs, input_slots, output_slots):
        self.op, self.kind, self.active = op, kind, active
        self.is_piecewise_linear = op.type in _PIECEWISE_LINEAR
        self._outputs = outputs
        self.inputs, self.outputs = input_slots, output_slots
        self.primals = tuple(op.inputs[i] for i in active)
        self.results = tuple(op.outputs[i] for i in outputs)
        self.function = _CLOSED_FORMS.get(op.type) if kind == steps.ELEMENTWISE else None

    def call(self, *active):
        values = list(self.op.inputs)
        for i, x in zip(self.active, active, strict=True):
            values[i] = x
        results = _run_again(self.op, values)
        return [results[i] for i in self._outputs]

    def jvp(self, fun, primals, tangents):
        # A pullback is linear in its cotangents, so its own pullback is the derivative along the tangents.
        inner, transposed = NativeTape(), NativeTape()
        with transposed, transposed:
            with inner, inner:
                primals = [tf.identity(x) for x in primals]
                inner.tape.watch(primals)
                values = fun(*primals)
                cotangents = [tf.zeros_like(y) for y in values]
                transposed.tape.watch(cotangents)
            gradients = dense(inner.tape.gradient(values, primals, cotangents))
            pairs = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None]
        if not pairs:
            return cotangents
        outputs, along = zip(*pairs, strict=True)
        found = dense(transposed.tape.gradient(list(outputs), cotangents, list(along)))
        found = [tf.zeros_like(y) if d is None else d for d, y in zip(found, values, strict=True)]
        return [_of_shape(d, y) for d, y in zip(found, self.results, strict=True)]

    def slope(self, fun, x):
        (found,) = pulled_back(lambda x: fun(x)[0], [x], tf.ones_like(x))
        return [_of_shape(found, self.primals[0])]

    def push_stacks(self, stacks):
        return _map_stacks(lambda *tangents: self.jvp(self.call, self.primals, tangents), stacks)

    def second_derivatives(self, left, right):
        count = len(self.primals)

        def second(*tangents):
            return self.jvp(lambda *x: self.jvp(self.call, x, tangents[:count]), self.primals, tangents[count:])

        return _map_stacks(second, [*left, *right])

    def push_linear(self, stacks):
        rule = linear_stacks.RULES.get(self.op.type)
        return rule and rule(self, stacks)

    def push_one(self, tangents):
        # These rules do not ask for the axis of the directions.
        return self.push_uniform(tangents)

    def push_uniform(self, stacks):
        rule = linear_stacks.UNIFORM.get(self.op.type)
        return rule and rule(self, stacks)


def _of_shape(x, like):
    # Gradients inside loops may not know their shape.
    x.set_shape(like.shape)
    return x


# Operations have other names for some arguments in their definition than in Python.
_RENAMED = {"reduction_indices": "axis", "split_dim": "axis"}


def _run_again(op, inputs):
    """Runs an operation of a graph on other inputs, so that tapes record it."""
    inputs, options, inferred = list(inputs), {}, set()
    for arg in op.op_def.input_arg:
        inferred |= {arg.type_attr, arg.number_attr, arg.type_list_attr}
        if arg.number_attr:
            count = op.get_attr(arg.number_attr)
        elif arg.type_list_attr:
            count = len(op.get_attr(arg.type_list_attr))
        else:
            count = None
        name = _RENAMED.get(arg.name, arg.name)
        options[name] = inputs.pop(0) if count is None else [inputs.pop(0) for _ in range(count)]
    for attr in op.op_def.attr:
        if attr.name not in inferred:
            options[attr.name] = op.get_attr(attr.name)
    results = getattr(tf.raw_ops, op.type)(**options)
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _map_stacks(fun, stacks):
    return map_rows(lambda rows: list(fun(*rows)), stacks)
