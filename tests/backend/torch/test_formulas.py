"""Operations whose second or third derivative torch has wrong, or not at all: in a tape's passes they are right."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return torch.tensor(RANDOM.normal(size=shape))


def alone(fun):
    """`fun` of one argument, as a case."""
    return fun, (normal(3, 4),)


RUNNING = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
LABELS = torch.tensor([[1, 2, 2], [3, 1, 0]])
LENGTHS = torch.tensor([6, 5]), torch.tensor([3, 2])


def ctc(x, targets=LABELS, **options):
    return F.ctc_loss(F.log_softmax(x, -1), targets, *LENGTHS, reduction="none", **options)


MENDED = {
    "layer_normalization": (lambda x, g, b: ops.layer_normalization(x, g, b), (normal(3, 4), normal(4), normal(4))),
    "layer_norm": (lambda x, g, b: F.layer_norm(x, (4,), g, b), (normal(3, 4), normal(4), normal(4))),
    "layer_norm without weights": alone(lambda x: F.layer_norm(x, (4,))),
    "layer_norm over two axes": (lambda x, g: F.layer_norm(x, (3, 2), g), (normal(2, 3, 2), normal(3, 2))),
    "torch.layer_norm": alone(lambda x: torch.layer_norm(x, (3, 4))),
    "batch_norm": (lambda x, g, b: F.batch_norm(x, None, None, g, b, True), (normal(3, 4), normal(4), normal(4))),
    "batch_norm with running statistics": alone(
        lambda x: F.batch_norm(x, *(t.clone() for t in RUNNING), training=True)
    ),
    "batch_norm by running statistics": alone(lambda x: F.batch_norm(x, *RUNNING)),
    "batch_norm of images": (lambda x: F.batch_norm(x, None, None, training=True), (normal(2, 3, 2, 2),)),
    "instance_norm": (lambda x, g: F.instance_norm(x, weight=g), (normal(2, 3, 4), normal(3))),
    "group_norm": (lambda x, g, b: F.group_norm(x, 2, g, b), (normal(2, 4, 3), normal(4), normal(4))),
    "rms_norm": (lambda x, g: F.rms_norm(x, (4,), g), (normal(3, 4), normal(4))),
    "rms_normalization": (lambda x, g: ops.rms_normalization(x, g), (normal(3, 4), normal(4))),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), (normal(2, 3, 4),)),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), (normal(3, 4), normal(3, 1))),
    "weight_norm over all": (lambda v, g: torch._weight_norm(v, g, -1), (normal(3, 4), normal(1, 1))),
    "weight_norm of the last axis": (lambda v, g: torch._weight_norm(v, g, 1), (normal(3, 4), normal(1, 4))),
    "hard_sigmoid": alone(lambda x: ops.hard_sigmoid(3 * x)),
    "hardsigmoid": alone(lambda x: F.hardsigmoid(3 * x)),
    "logcumsumexp": alone(lambda x: torch.logcumsumexp(x, 0)),
    "logcumsumexp of rows": alone(lambda x: torch.logcumsumexp(x, -1)),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        (normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4)),
    ),
    "causal attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3),
        (normal(1, 2, 3, 4),),
    ),
    "masked attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, torch.eye(3, dtype=torch.bool).logical_not()),
        (normal(1, 2, 3, 4),),
    ),
    "ctc_loss": (ctc, (normal(6, 2, 4),)),
    "ctc_loss with another blank": (
        lambda x: ctc(x, torch.tensor([[1, 2, 2], [0, 1, 0]]), blank=3),
        (normal(6, 2, 4),),
    ),
    "ctc_loss of labels in a row": (lambda x: ctc(x, torch.tensor([1, 2, 2, 3, 1])), (normal(6, 2, 4),)),
    "keras.ops.ctc_loss": (lambda x: ops.ctc_loss(LABELS, x, LENGTHS[1], LENGTHS[0]), (normal(2, 6, 4),)),
}
if not hasattr(ops, "layer_normalization"):  # before Keras 3.11
    del MENDED["layer_normalization"]


def slopes(fun, arguments, order):
    """[f, D f, D D f, ...] as functions of t, each the derivative of the one before by a tape: f(x + t v) at t."""
    directions = [torch.tensor(np.cos(np.arange(x.numel())).reshape(x.shape)) / 2 for x in arguments]
    weights = []

    def value(t):
        y = fun(*[torch.sin(x + t * v) for x, v in zip(arguments, directions, strict=True)]).to(torch.float64)
        if not weights:
            weights.append(torch.tensor(np.sin(1 + np.arange(y.numel())).reshape(y.shape)))
        return ops.sum(y * weights[0] + 0.3 * y * y)

    levels = [value]
    for _ in range(order):
        levels.append(kg.grad(levels[-1]))
    return levels


def central_difference(fun, h=1e-3):
    def slope(h):
        return (float(fun(tensor(h, "float64"))) - float(fun(tensor(-h, "float64")))) / (2 * h)

    return (4 * slope(h) - slope(2 * h)) / 3


def step(name):
    # Keras computes some of its operations in single precision, whatever it is given.
    return {"h": 1e-2} if name in IN_SINGLE_PRECISION else {}


def tolerance(name):
    return {"rtol": 2e-3, "atol": 2e-3} if name in IN_SINGLE_PRECISION else {"rtol": 1e-5, "atol": 1e-6}


IN_SINGLE_PRECISION = {"layer_normalization", "rms_normalization", "keras.ops.ctc_loss"}


@pytest.mark.parametrize("name", MENDED)
def test_to_fourth_order(name):
    """Each order against central differences of the one below, in double precision."""
    fun, arguments = MENDED[name]
    levels = slopes(fun, arguments, 4)
    zero = tensor(0.0, "float64")
    for below, above in zip(levels[:-1], levels[1:], strict=True):
        expected = central_difference(below, **step(name))
        close(above(zero), expected, **tolerance(name))
        close(kg.jvp(below, (zero,), (ops.ones_like(zero),))[1], expected, **tolerance(name))


class TestNormalization:
    x = tensor([[0.3, -1.2, 2, 0.5], [1, 0.2, -0.4, 0.7], [0.1, 0.8, -2, 1]], "float64")
    gain = tensor([1, 0.5, -0.3, 0.8], "float64")

    def third(self, fun, x=None):
        return float(slopes(fun, (self.x if x is None else x,), 3)[3](tensor(0.0, "float64")))

    def plain(self, x):
        x = x - ops.mean(x, -1, keepdims=True)
        return x / ops.sqrt(ops.mean(x * x, -1, keepdims=True) + 1e-5)

    def test_the_example_of_a_sine(self):
        """Of the normalization by its definition, in elementary operations."""
        close(tensor(self.third(lambda x: F.layer_norm(x, (4,)))), self.third(self.plain), rtol=1e-6)

    def test_the_forward_pass_stays_fused(self):
        with kg.GradientTape() as tape:
            tape.watch(self.x)
            y = F.layer_norm(self.x, (4,))
        assert type(y.grad_fn).__name__ == "NativeLayerNormBackward0"
        close(y.detach(), self.plain(self.x).numpy())

    def test_vectorized(self):
        """The third derivatives of all elements at once, along the direction that nested gradients take."""

        def value(x):
            return ops.sum(ops.sin(F.layer_norm(x, (4,), self.gain)))

        x, v = self.x[:1], tensor([[0.5, -1, 0.3, 0.7]], "float64")
        thirds = ops.reshape(kg.jacobian(kg.hessian(value))(x), (4, 4, 4))
        nested = kg.grad(kg.grad(kg.grad(lambda t: value(x + t * v))))(tensor(0.0, "float64"))
        close(ops.einsum("ijk,i,j,k->", thirds, v[0], v[0], v[0]), float(nested), rtol=1e-6)
        close(nested, central_difference(kg.grad(kg.grad(lambda t: value(x + t * v)))), rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_other_types(self, dtype):
        x = ops.cast(self.x, dtype)
        tolerance = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[dtype]
        for weights in ((), (self.gain,)):

            def fun(x, dtype=self.x.dtype, weights=weights):
                return F.layer_norm(x.to(dtype), (4,), *[w.to(dtype) for w in weights])

            found = self.third(lambda t, fun=fun: fun(t, dtype=x.dtype))
            close(tensor(found), self.third(fun), rtol=tolerance, atol=tolerance)
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = ops.sum(ops.sin(F.layer_norm(x, (4,))))
            slope = tape.gradient(y, x)
        assert slope.dtype == outer.gradient(slope, x).dtype == x.dtype

    def test_under_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self.third(
                lambda x: F.layer_norm(x.float() @ torch.eye(4), (4,), self.gain.float()), self.x.float()
            )
        close(tensor(found), self.third(lambda x: F.layer_norm(x, (4,), self.gain)), rtol=0.1, atol=0.05)

    def test_running_statistics_move_as_without_a_tape(self):
        statistics = [[torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)] for _ in range(2)]
        y = F.batch_norm(self.x, *statistics[0], training=True, momentum=0.3)
        with kg.GradientTape() as outer:
            outer.watch(self.x)
            with kg.GradientTape() as tape:
                tape.watch(self.x)
                taped = F.batch_norm(self.x, *statistics[1], training=True, momentum=0.3)
                total = ops.sum(ops.sin(taped))
            slope = tape.gradient(total, self.x)
        outer.gradient(slope, self.x)
        close([taped.detach(), *statistics[1]], [t.numpy() for t in (y, *statistics[0])], rtol=0, atol=0)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "make",
        [
            keras.layers.LayerNormalization,
            keras.layers.BatchNormalization,
            lambda **options: keras.layers.GroupNormalization(2, **options),
            lambda **options: keras.layers.RMSNormalization(**options),
            lambda **options: keras.layers.TorchModuleWrapper(torch.nn.LayerNorm(4).double(), **options),
            lambda **options: keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(4).double(), **options),
        ],
        ids=["layer", "batch", "group", "rms", "torch layer", "torch batch"],
    )
    def test_layers(self, make, training):
        layer = make(dtype="float64")
        layer(self.x)
        fun, weights = kg.functionalize(layer)
        below, above = slopes(lambda x: fun(weights, x, training=training), (self.x,), 3)[2:]
        close(above(tensor(0.0, "float64")), central_difference(below, h=1e-2), rtol=2e-3, atol=2e-3)

    def test_under_a_checkpoint(self):
        found = self.third(keras.remat(lambda x: F.layer_norm(ops.sin(x), (4,))))
        close(tensor(found), self.third(lambda x: F.layer_norm(ops.sin(x), (4,))), rtol=1e-6)

    @pytest.mark.parametrize(
        "fun", [lambda x: F.layer_norm(x, (4,)), lambda x: F.batch_norm(x, None, None, training=True)]
    )
    def test_over_a_derivative_that_torch_has_taken(self, fun):
        """The first order is torch's, the others are the tape's."""

        def slope(t):
            t = t.view_as(t) if t.requires_grad else t.clone().requires_grad_()
            y = ops.sum(ops.sin(fun(torch.sin(self.x + t))))
            return torch.autograd.grad(y, t, create_graph=True)[0]

        zero = tensor(0.0, "float64")
        below = slope
        for _ in range(2):
            above = kg.grad(below)
            close(above(zero), central_difference(below), rtol=1e-5, atol=1e-6)
            below = above

    def test_torch_goes_on_from_a_derivative_of_a_tape(self):
        """The first order is the tape's, the others are torch's."""
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def value(t):
            return ops.sum(ops.sin(F.layer_norm(torch.sin(self.x + t * self.gain), (4,))))

        found = kg.grad(value)(t)
        for _ in range(2):
            (found,) = torch.autograd.grad(found, t, create_graph=True)
        close(found.detach(), central_difference(kg.grad(kg.grad(value))), rtol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in MENDED if "running" not in n and not n.startswith(("ctc", "keras.ops.ctc"))]
)
def test_of_gradients_of_examples(name):
    """They are torch's, by `vmap` of `torch.func.grad`: to second and third order, against central differences."""
    fun, arguments = MENDED[name]
    shifts = tensor([0.0, 0.1], "float64")

    def gradients(t):
        level = slopes(fun, arguments, 0)[0]
        return ops.sum(kg.per_example_grad(lambda w, shift: level(w + shift[0]))(t, shifts))

    below, zero = gradients, tensor(0.0, "float64")
    for _ in range(2):
        above = kg.grad(below)
        close(above(zero), central_difference(below, **step(name)), **tolerance(name))
        below = above


class TestActivations:
    """Every one of Keras has a second derivative here; away from kinks it is that of its definition."""

    x = np.array([-3.7, -0.8, -0.2, 0.4, 1.3, 4.1])

    @pytest.mark.parametrize(
        "name",
        ["celu", "elu", "gelu", "glu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu"]
        + ["log_sigmoid", "log_softmax", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink", "softmax"]
        + [
            "softplus",
            "softsign",
            "sparse_plus",
            "sparse_sigmoid",
            "sparsemax",
            "squareplus",
            "tanh_shrink",
            "threshold",
        ],
    )
    def test_second_derivative(self, name):
        activation = getattr(ops, name)
        fun = (lambda x: activation(x, 0.1, 0.5)) if name == "threshold" else activation

        def value(x):
            return ops.sum(fun(x) * ops.sin(ops.cumsum(ops.ones_like(fun(x)))) + ops.square(fun(x)))

        v = np.cos(np.arange(6))
        slope = kg.grad(value)
        expected = [slope(tensor(self.x + h * v, "float64")).numpy() for h in (1e-5, -1e-5)]
        found = kg.hvp(value, (tensor(self.x, "float64"),), (tensor(v, "float64"),))[0]
        close(found, (expected[0] - expected[1]) / 2e-5, rtol=1e-4, atol=1e-5)

    def test_hard_sigmoid_in_closed_form(self):
        x = tensor([-4.0, -1, 0, 2, 5])
        close(kg.grad(lambda x: ops.sum(ops.square(ops.hard_sigmoid(x))))(x), [0, 1 / 9, 1 / 6, 5 / 18, 0])
        close(
            kg.hvp(lambda x: ops.sum(ops.square(ops.hard_sigmoid(x))), (x,), (ops.ones_like(x),))[0],
            np.array([0, 1, 1, 1, 0]) / 18,
        )


class TestWhatTorchHasNoDerivativeOf:
    """The error names torch's operation."""

    @pytest.mark.parametrize("inner", [lambda x: x, lambda x: x * x], ids=["of a leaf", "inside"])
    @pytest.mark.parametrize(
        ("operation", "fun"),
        [
            ("multi_margin_loss", lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2]))),
            ("cdist", lambda x: ops.sum(torch.cdist(x, x.detach() + 1, p=3.0))),
            ("segment_reduce", lambda x: ops.sum(torch.segment_reduce(x[0], "prod", lengths=torch.tensor([2, 2])))),
        ],
    )
    def test_second_derivative(self, operation, fun, inner):
        x = tensor(np.linspace(0.1, 1, 12).reshape(3, 4))

        def value(x):
            return fun(inner(x))

        assert np.any(kg.grad(value)(x).numpy())
        for second in (
            lambda: kg.hvp(value, (x,), (x,)),
            lambda: kg.hessian(value)(x),
            lambda: kg.jvp(value, (x,), (x,)),
        ):
            with pytest.raises(RuntimeError, match=rf"no second derivative of its operation `{operation}`"):
                second()

    def test_first_derivative(self):
        x = tensor([1.0, 2.0])
        with pytest.raises(RuntimeError, match=r"torch has no derivative of its operation `floor_divide`"):
            kg.grad(lambda x: ops.sum(torch.floor_divide(x, 2.0)))(x)

    def test_a_function_of_the_user(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, upstream):
                return 2 * upstream * ctx.saved_tensors[0]

        x = tensor([1.0, 2.0])
        with pytest.raises(RuntimeError, match=r"torch.autograd.Function .*once_differentiable"):
            kg.hessian(lambda x: ops.sum(ops.square(Square.apply(x))))(x)
        # The cotangent is a constant: torch itself gives zeros.
        for second in (kg.hessian, lambda fun: lambda x: kg.hvp(fun, (x,), (x,))):
            with pytest.raises(RuntimeError, match=r"torch.autograd.Function .*once_differentiable"):
                second(lambda x: ops.sum(Square.apply(x)))(x)
        with pytest.raises(RuntimeError, match=r"torch.autograd.Function .*once_differentiable"):
            kg.jacobian(kg.jacobian(Square.apply))(x)
        close(kg.grad(lambda x: ops.sum(Square.apply(x)))(x), [2, 4])

    @pytest.mark.parametrize(
        ("fun", "slope"),
        [
            (lambda x: torch.sum(x**3), lambda x: (3 * x * x, 6 * x)),
            (lambda x: torch.sum(torch.exp(x)), lambda x: (np.exp(x), np.exp(x))),
        ],
        ids=["saves its argument", "saves its value"],
    )
    @torch._functorch.config.patch(donated_buffer=False)
    def test_a_compiled_function(self, fun, slope):
        # torch itself gives zeros where the argument is a view, and where only values of the function are saved.
        compiled, x = torch.compile(fun, backend="aot_eager"), tensor([1.0, 2.0])
        slope, curvature = slope(np.array([1.0, 2.0]))
        close(kg.grad(compiled)(x), slope)
        close(kg.vjp(compiled, x)[1](2.0)[0], 2 * slope)
        # The first derivative can be used in an outer tape, as long as that tape does not differentiate it.
        close(kg.grad(lambda x: ops.sum(x * kg.stop_gradient(kg.grad(compiled)(x))))(x), slope)
        for second in (
            lambda: kg.hvp(compiled, (x,), (x,)),
            lambda: kg.linearize(kg.grad(compiled), x)[1](x),
            lambda: kg.jvp(compiled, (x,), (x,)),
            lambda: kg.jvp(lambda x: compiled(x) * x, (x,), (x,)),
            lambda: _nested_tapes(compiled, x),
            lambda: _nested_tapes(lambda x: compiled(x[:]) * x, x),
        ):
            with pytest.raises(RuntimeError, match=r"second derivative.* compiled by `torch.compile`"):
                second()
        # While a call is recorded, torch runs the function itself.
        close(kg.jacobian(lambda x: torch.stack([compiled(x), 2 * compiled(x)]))(x), [slope, 2 * slope])
        for second in (kg.hessian(compiled), kg.jacobian(kg.grad(compiled), mode="reverse")):
            for _ in range(3):
                close(second(x), np.diag(curvature))


def _nested_tapes(fun, x):
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = fun(x)
        slope = inner.gradient(y, x)
    return outer.gradient(slope, x)


class TestOperationsOfKeras:
    @pytest.mark.skipif(not hasattr(ops, "cholesky_inverse"), reason="this Keras has no cholesky_inverse")
    def test_the_half_that_cholesky_inverse_does_not_read(self):
        lower = tensor(np.tril(np.arange(1, 10).reshape(3, 3) / 4), "float64")
        for upper, x in ((False, lower), (True, ops.transpose(lower))):
            slope = kg.grad(lambda x: ops.sum(ops.square(ops.cholesky_inverse(x, upper=upper))))(x)  # noqa: B023
            other = np.triu(slope.numpy(), 1) if not upper else np.tril(slope.numpy(), -1)
            close(tensor(other), np.zeros((3, 3)))
            assert np.any(slope.numpy())

    def test_the_steps_of_floor_divide_are_flat(self):
        close(kg.grad(lambda x: ops.sum(ops.floor_divide(x, 2.0) + x * x))(tensor([3.0, 5])), [6, 10])
        close(ops.floor_divide(tensor([3.0, 5]), 2.0), [1, 2])

    def test_affine_transform_by_the_transform(self):
        images = tensor(RANDOM.uniform(size=(1, 4, 4, 1)))
        transform = tensor([0.9, 0.1, 0.3, -0.1, 1.1, 0.2, 0, 0])
        kept = transform.clone()
        slope = kg.grad(lambda t: ops.sum(ops.square(ops.image.affine_transform(images, t))))(transform)
        close(transform, kept.numpy())

        def value(h):
            moved = kept.clone()
            moved[2] += h
            return float(ops.sum(ops.square(ops.image.affine_transform(images, moved))))

        close(slope[2], (value(1e-2) - value(-1e-2)) / 2e-2, rtol=1e-2)
