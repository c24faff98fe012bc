"""Operations that torch's vectorized backward pass knows by `batching_rules`, against the same for each row."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("the rules are torch's", allow_module_level=True)

import torch
from torch._vmap_internals import _vmap

import keras_gradtools as kg
from keras_gradtools.backend.torch import batching_rules

aten = torch.ops.aten
ROWS = 5
SHAPES = [(), (4,), (3, 4), (16, 64), (2, 3, 4, 4)]
BATCHED = [(0, 0), (0, None), (None, 0)]


@pytest.fixture(autouse=True, scope="module")
def rules():
    batching_rules.install()


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def normal(request):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=request.param)


def check(function, *args, batched=(0,)):
    def flat(*args):
        results = function(*args)
        return results if isinstance(results, tuple) else (results,)

    rows = [flat(*[x if axis is None else x[i] for x, axis in zip(args, batched, strict=True)]) for i in range(ROWS)]
    found = _vmap(flat, in_dims=batched, out_dims=0)(*args)
    for a, column in zip(found, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(column), rtol=2e-5, atol=2e-6)


def given(normal, shape, batched):
    return [normal(*([ROWS] if axis == 0 else []), *shape) for axis in batched]


PAIRS = {
    "tanh": aten.tanh_backward,
    "gelu": lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    "gelu, exact": aten.gelu_backward,
    "silu": aten.silu_backward,
    "softplus": lambda g, x: aten.softplus_backward(g, x, 1.0, 20.0),
    "elu": lambda g, x: aten.elu_backward(g, 1.0, 1.0, 1.0, False, x),
    "hard_sigmoid": aten.hardsigmoid_backward,
    "hard_silu": aten.hardswish_backward,
    "hard_tanh": lambda g, x: aten.hardtanh_backward(g, x, -1.0, 1.0),
    "leaky_relu": lambda g, x: aten.leaky_relu_backward(g, x, 0.1, False),
    "log_sigmoid": lambda g, x: aten.log_sigmoid_backward(g, x, x),
    "mish": aten.mish_backward,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, b),
    "where scalar": lambda a, b: torch.where(a > b, a, 0.0) + torch.where(a > b, 1.0, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "type_as": lambda a, b: a.type_as(b),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 2.0),
    "fmod": lambda a, b: torch.fmod(a, b),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_elementwise(name, shape, batched, normal):
    check(PAIRS[name], *given(normal, shape, batched), batched=batched)


def test_arguments_of_other_ranks(normal):
    # A row of the second argument has fewer axes than the first.
    check(torch.maximum, normal(3, 4), normal(ROWS, 4), batched=(None, 0))
    check(torch.where, normal(ROWS, 3, 4) > 0, normal(ROWS, 4), normal(4), batched=(0, 0, None))


SINGLE = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda x: torch.full_like(x, 2.0),
    "erf": torch.erf,
    **{name: getattr(torch.nn.functional, name) for name in ("elu", "gelu", "softplus", "mish", "silu", "hardtanh")},
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_one_tensor(name, shape, normal):
    check(SINGLE[name], normal(ROWS, *shape))


ALONG = {
    "log_softmax": lambda x, axis: aten._log_softmax(x, axis, False),
    "softmax": lambda x, axis: aten._softmax(x, axis, False),
    "cumsum": lambda x, axis: x.cumsum(axis),
    "flip": lambda x, axis: x.flip(axis),
    "flip of no axis": lambda x, axis: x.flip([]),
    "amax": lambda x, axis: x.amax(axis),
    "amax, kept": lambda x, axis: x.amax(axis, True),
    "amax of all": lambda x, axis: x.amax(),
    "logsumexp": lambda x, axis: x.logsumexp(axis),
    "mean": lambda x, axis: aten.mean.dim(x, [axis]),
    "mean, kept": lambda x, axis: aten.mean.dim(x, [axis], True),
    "mean of all": lambda x, axis: aten.mean.dim(x, None),
}


def axes(shape):
    return (-1,) if len(shape) < 2 else (-1, 0, 1)


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_along_an_axis(name, shape, normal):
    x = normal(ROWS, *shape)
    for axis in axes(shape):
        check(lambda x, axis=axis: ALONG[name](x, axis), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_derivatives_of_softmax(shape, batched, normal):
    a, b = given(normal, shape, batched)
    for axis in axes(shape):
        for function in (aten._log_softmax_backward_data, aten._softmax_backward_data):
            check(lambda g, y, f=function, axis=axis: f(g, y, axis, a.dtype), a, b, batched=batched)


def test_indices_along_an_axis(normal):
    x, places, row = normal(ROWS, 3, 4), torch.randint(0, 4, (ROWS, 3, 2)), torch.randint(0, 4, (3, 2))
    check(lambda x: x.gather(1, row), x)
    check(lambda x, i: x.gather(-1, i), x, places, batched=(0, 0))
    check(lambda x, i: x.gather(1, i), x[0], places, batched=(None, 0))
    check(lambda x, y: x.scatter_add(1, row, y), x, normal(ROWS, 3, 2), batched=(0, 0))


def test_of_the_last_axes(normal):
    x = normal(ROWS, 3, 4)
    check(torch.tril, x)
    check(lambda x: torch.triu(x, 1), x)
    check(lambda x: aten.constant_pad_nd(x, [1, 2, 0, 1], 0.5), x)


def test_in_place(normal):
    x, mask = normal(ROWS, 3, 4), normal(3, 4) > 0
    check(lambda x: x.clone().masked_fill_(mask, 2.0), x)
    check(lambda x, m: x.clone().masked_fill_(m, 2.0), x, normal(ROWS, 4) > 0, batched=(0, 0))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 4, 4)], ids=str)
def test_pooling(shape, normal):
    gradients, x = normal(ROWS, *shape[:-2], 2, 2), normal(*shape)
    windows = [2, 2], [2, 2], [0, 0]
    check(lambda g: aten.avg_pool2d_backward(g, x, *windows, False, True, None), gradients)
    check(
        lambda g, x: aten.avg_pool2d_backward(g, x, *windows, False, True, None),
        *(gradients, normal(ROWS, *shape)),
        batched=(0, 0),
    )
    _, places = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    check(lambda g: aten.max_pool2d_with_indices_backward(g, x, *windows, [1, 1], False, places), gradients)
    check(lambda x: torch.nn.functional.avg_pool2d(x, 2), normal(ROWS, *shape))


@pytest.mark.parametrize("wanted", [[True, False, False], [True, True, False], [True, True, True]], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolution(wanted, layout, normal):
    kernel, x = normal(6, 3, 3, 3), normal(2, 3, 4, 4).to(memory_format=layout)
    options = [6], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted

    def gradients(g, kernel=kernel):
        return aten.convolution_backward(g, x, kernel, *options)[: sum(wanted)]

    check(gradients, normal(ROWS, 2, 6, 4, 4))
    check(gradients, normal(ROWS, 2, 6, 4, 4), normal(ROWS, 6, 3, 3, 3), batched=(0, 0))


@pytest.mark.parametrize("wanted", [[True, False, False], [True, True, True]], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 8)], ids=str)
def test_layer_normalization(wanted, shape, normal):
    x, scale, bias = normal(*shape), normal(shape[-1]), normal(shape[-1])
    _, mean, factor = aten.native_layer_norm(x, [shape[-1]], scale, bias, 1e-5)

    def gradients(g, x=x):
        found = aten.native_layer_norm_backward(g, x, [shape[-1]], mean, factor, scale, bias, wanted)
        return found[: sum(wanted)]

    check(gradients, normal(ROWS, *shape))
    check(gradients, normal(ROWS, *shape), normal(ROWS, *shape), batched=(0, 0))


def test_a_jacobian_takes_no_row_apart():
    """The operations of a Jacobian of many rows are as many as those of one of few."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(outputs):
        hidden = [
            keras.layers.Conv2D(4, 3, activation="tanh"),
            keras.layers.AveragePooling2D(2),
            keras.layers.LayerNormalization(),
            keras.layers.Conv2D(4, 3, activation="gelu"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="softmax"),
        ]
        model = keras.Sequential([keras.Input((12, 12, 1)), *hidden, keras.layers.Dense(outputs)])
        model.trainable = False
        x = keras.random.normal((2, 12, 12, 1), seed=0)
        with Count() as count, kg.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
            tape.batch_jacobian(y, x)
        return count.calls

    assert calls(20) == calls(4)
