"""Traps of torch alone: one graph for all tapes, flags on tensors, threads, fused kernels, memory."""

import contextlib
import gc
import threading
import types
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common import dtypes

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

from keras_gradtools import backend  # noqa: E402
from keras_gradtools.backend.torch import borrowing, fused, pullbacks, windows  # noqa: E402
from keras_gradtools.gradient_control.custom_gradient import custom_gradient  # noqa: E402
from keras_gradtools.keras_state.recording import active_tapes  # noqa: E402


def variable(x, trainable=True):
    return keras.Variable(np.asarray(x, "float32"), trainable=trainable)


def parameter(x):
    """A leaf that requires gradients by itself, as those of a user's own torch code."""
    return torch.tensor(x, requires_grad=True)


def in_thread(fun):
    results = []
    thread = threading.Thread(target=lambda: results.append(fun()))
    thread.start()
    thread.join()
    return results[0]


class TestWindows:
    """A user's own parameter has a graph everywhere; only what the tape has seen counts."""

    def test_before_inside_and_after_the_block(self):
        x = parameter(3.0)
        before = x * x
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x * before
        after = y * x
        close([tape.gradient(y, x), tape.gradient(after, x), tape.gradient(before, x)], [9, None, None])

    def test_stop_recording(self):
        x = parameter(3.0)
        with kg.GradientTape() as outer, kg.GradientTape() as tape:
            outer.watch(x)
            tape.watch(x)
            with tape.stop_recording():
                stopped = x * x
            y = stopped * x
        close([tape.gradient(y, x), outer.gradient(y, x)], [9, 27])

    def test_reset(self):
        x = parameter(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            before = x * x
            tape.reset()
            tape.watch(x)
            y = before * x
        close(tape.gradient(y, x), 9)

    def test_many_windows(self):
        x = parameter(2.0)
        y, expected = x * 0, 0
        with kg.GradientTape() as tape:
            tape.watch(x)
            for _ in range(100):
                y = y + x * x
                expected += 4
                with tape.stop_recording():
                    _ = x * x
        close(tape.gradient(y, x), expected)

    def test_a_parameter_that_is_not_watched(self):
        """Neither it nor what was computed from it alone is connected, though torch has a graph for both."""
        p, x = parameter(2.0), tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            hidden = p * p
            y = hidden * x * p
        close(tape.gradient(y, [p, hidden, x]), [None, None, 8])

    def test_a_parameter_used_before_it_was_watched(self):
        p = parameter(3.0)
        with kg.GradientTape() as tape:
            tape.watch(p * 1.0)
            early = p * p
            tape.watch(p)
            y = early * p
        close(tape.gradient(y, [p, early]), [9, None])

    def test_an_intermediate_value_used_before_it_was_watched(self):
        p = parameter(3.0)
        hidden = p * 2.0
        with kg.GradientTape() as tape:
            early = hidden * hidden
            tape.watch(hidden)
            y = early * hidden
        close(tape.gradient(y, [hidden, p]), [36, None])

    def test_watching_what_is_followed_already_changes_nothing(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            hidden = x * x
            cube = hidden * x
            tape.watch(hidden)
            y = cube * hidden
        close(tape.gradient(y, [x, hidden]), [405, 9 * 3 + 27])

    def test_an_intermediate_source_beside_the_tensor_it_was_computed_from(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            hidden = x * x
            y = hidden * x
        close(tape.gradient([y, hidden], [hidden, x, hidden]), [4, 33, 4])


class TestBoundaries:
    def test_no_gradient_flows_behind_one_and_not_a_zero_either(self):
        """The derivative of the square root is infinite at 0, and infinity times zero is NaN."""
        x = parameter(0.0)
        root = ops.sqrt(x)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = root * x + 2 * x
        close(tape.gradient(y, x), 2)

    def test_a_custom_gradient_behind_one_is_not_run(self):
        @custom_gradient
        def identity(x):
            return x * 1.0, lambda upstream: upstream / (0 * x)

        x = parameter(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with tape.stop_recording():
                stopped = identity(x)
            y = stopped * x
        close(tape.gradient(y, x), 3)

    @pytest.mark.parametrize("fails", [False, True])
    def test_no_hook_is_left(self, fails):
        x = parameter(3.0)
        square = x * x
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = square * x
            if fails:
                y = _failing(y)
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            tape.gradient(y, x)
        close(torch.autograd.grad(square * x, x)[0], 27)
        functions = [o for o in gc.get_objects() if type(o) is types.FunctionType]
        assert "passing.<locals>.stop" not in {f.__qualname__ for f in functions}

    def test_a_backward_pass_inside_another_one(self):
        """The outer pass stops at `square`, which the inner one has to cross."""
        x = parameter(3.0)
        with kg.GradientTape(persistent=True) as inner:
            inner.watch(x)
            square = x * x

        @custom_gradient
        def scaled(t):
            return t * 1.0, lambda upstream: upstream * inner.gradient(square, x)

        with kg.GradientTape() as tape:
            tape.watch(x)
            y = square * scaled(x)
        close(tape.gradient(y, x), 54)


def _failing(x):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyError

    return Failing.apply(x)


class TestThreads:
    def test_two_at_once(self):
        """Both number their nodes from the same start, and neither sees what the other computes."""
        barrier = threading.Barrier(2, timeout=60)
        x = parameter(3.0)

        def work(power):
            for _ in range(20):
                barrier.wait()
                with kg.GradientTape() as tape:
                    tape.watch(x)
                    barrier.wait()
                    y = x**power
                barrier.wait()
                result = tape.gradient(y, x)
            return float(result.detach())

        results = {}
        threads = [threading.Thread(target=lambda p=p: results.update({p: work(p)})) for p in (2, 3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert results == {2: 6.0, 3: 27.0}

    def test_an_open_tape_does_not_see_what_another_thread_computes(self):
        x = parameter(2.0)

        def opened():
            with kg.GradientTape(persistent=True) as tape:
                tape.watch(x)
                y = [x * x for _ in range(50)][0]
                with tape.stop_recording():
                    return in_thread(lambda: [tape.gradient(x * x, x) for _ in range(30)]), tape.gradient(y, x)

        asked_there, asked_here = in_thread(opened)
        assert asked_there == [None] * 30
        close(asked_here, 4)

    def test_a_tape_does_not_go_on_on_another_thread(self):
        """Both threads start to count at their first operation: the numbers would not tell them apart."""
        tape = kg.GradientTape(persistent=True)

        def enter():
            with tape:
                pass

        in_thread(enter)
        with pytest.raises(RuntimeError, match="cannot go on recording on another thread"):
            enter()
        assert active_tapes() == []

    def test_a_closed_tape_can_be_handed_over(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
        close(in_thread(lambda: tape.gradient(y, x)), 6)

    def test_a_recorded_pass_runs_on_the_calling_thread(self):
        """The threads of the engine would number its nodes on their own."""
        seen = []

        class Spy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                seen.append(torch.autograd.is_multithreading_enabled())
                return gradient * 2

        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = Spy.apply(x)
        close(tape.gradient(y, x), 2)
        assert seen == [False]
        assert torch.autograd.is_multithreading_enabled()

    def test_another_thread_keeps_its_grad_mode_and_its_fused_kernels(self):
        with torch.no_grad(), kg.GradientTape():
            assert torch.is_grad_enabled()
            assert in_thread(lambda: (torch.is_grad_enabled(), active_tapes())) == (True, [])


class TestRequiresGrad:
    def test_restored_after_the_block(self):
        x, p, frozen = tensor(3.0), parameter(2.0), variable(5.0, trainable=False)
        with kg.GradientTape() as tape:
            tape.watch([x, p, frozen])
            y = x * p * frozen
            assert x.requires_grad and frozen.value.requires_grad
        assert [t.requires_grad for t in (x, p, frozen.value)] == [False, True, False]
        close(tape.gradient(y, [x, p, frozen]), [10, 15, 6])
        assert [t.requires_grad for t in (x, p, frozen.value)] == [False, True, False]
        assert x.grad is None and p.grad is None and frozen.value.grad is None

    def test_restored_after_an_exception(self):
        x = tensor(3.0)
        with pytest.raises(KeyError), kg.GradientTape() as outer, kg.GradientTape() as tape:
            outer.watch(x)
            tape.watch(x)
            raise KeyError
        assert not x.requires_grad

    @pytest.mark.parametrize("first", [0, 1])
    def test_restored_when_the_last_tape_is_left(self, first):
        x = tensor(3.0)
        tapes = [kg.GradientTape(), kg.GradientTape()]
        for tape in tapes:
            tape.__enter__()
            tape.watch(x)
        tapes[first].__exit__(None, None, None)
        assert x.requires_grad
        y = x * x
        tapes[1 - first].__exit__(None, None, None)
        assert not x.requires_grad
        close([tapes[first].gradient(y, x), tapes[1 - first].gradient(y, x)], [None, 6])

    def test_an_enclosing_tape_that_does_not_watch(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer:
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = x * x
            assert not x.requires_grad
            slope = inner.gradient(y, x)
        close([slope, outer.gradient(slope, x)], [6, None])

    def test_set_again_when_the_tape_is_re_entered(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
        assert not x.requires_grad
        with tape:
            assert x.requires_grad
            y = y * x
        assert not x.requires_grad
        close(tape.gradient(y, x), 27)

    @pytest.mark.parametrize("ends", ["reset", "gradient"])
    def test_restored_when_the_record_is_thrown_away(self, ends):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            if ends == "reset":
                tape.reset()
            else:
                close(tape.gradient(x * x, x), 6)
            assert not x.requires_grad
        assert not x.requires_grad

    def test_a_layer_unfrozen_inside_the_block_stays_so(self):
        v = variable(3.0, trainable=False)
        with kg.GradientTape() as tape:
            tape.watch(v)
            _ = v * v
            v.trainable = True
        assert v.value.requires_grad
        assert not borrowing._borrowed

    def test_an_inference_tensor(self):
        with torch.inference_mode():
            x = tensor(3.0)
        with kg.GradientTape() as tape:
            with pytest.raises(ValueError, match=r"inference_mode.*Received: .*float32.*\(\).*keras.ops.copy"):
                tape.watch(x)
            copied = ops.copy(x)
            tape.watch(copied)
            y = copied * copied
        close(tape.gradient(y, copied), 6)

    def test_under_inference_mode(self):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"), kg.GradientTape():
            pass
        assert active_tapes() == []


class TestGradMode:
    def test_under_no_grad(self):
        """Keras builds, evaluates and predicts so."""
        x, v = tensor(3.0), variable(2.0)
        with torch.no_grad():
            with kg.GradientTape() as outer:
                outer.watch(x)
                with kg.GradientTape() as tape:
                    tape.watch(x)
                    y = x * x * x * v
                slope = tape.gradient(y, x)
            second, mixed = outer.gradient(slope, [x, v])
            assert not torch.is_grad_enabled()
            assert not second.requires_grad
        close([slope, second, mixed], [54, 36, 27])

    @pytest.mark.parametrize("ambient", [True, False])
    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)], ids=str)
    def test_restored_in_any_order(self, ambient, order):
        with torch.set_grad_enabled(ambient):
            tapes = [kg.GradientTape() for _ in range(3)]
            for tape in tapes:
                tape.__enter__()
            for i in order:
                assert torch.is_grad_enabled()
                tapes[i].__exit__(None, None, None)
            assert torch.is_grad_enabled() is ambient

    def test_restored_inside_a_no_grad_block_of_an_outer_tape(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer:
            outer.watch(x)
            with torch.no_grad():
                with kg.GradientTape() as tape:
                    tape.watch(x)
                    y = x * x
                stopped = x * x
            z = x * stopped
        close([tape.gradient(y, x), outer.gradient(z, x)], [6, 9])

    def test_a_gradient_under_no_grad_is_a_constant_to_an_outer_tape(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x * x
            with torch.no_grad():
                slope = tape.gradient(y, x)
            z = slope * x
        close(outer.gradient(z, x), 6)

    def test_the_native_backward_pass_goes_through_a_gradient(self):
        """The loss of Keras' `fit` may contain one."""
        x, v = tensor(3.0), variable(2.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x * v * v
        (tape.gradient(y, x) ** 2).backward()
        # (2 x v^2)^2 has the derivative 16 x^2 v^3.
        close(v.value.grad, 1152)

    def test_the_native_backward_pass_goes_through_a_jvp(self):
        x, v = tensor(3.0), variable(2.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x * v * v
        tape.jvp(y, x, tensor(1.0)).backward()
        close(v.value.grad, 24)

    @pytest.mark.parametrize("method", ["gradient", "jvp", "jacobian", "gradient of jvp"])
    def test_a_result_that_nobody_can_differentiate_is_plain(self, method):
        x = tensor([3.0])
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x * x * x
            if method == "gradient of jvp":
                y = tape.jvp(y, x, tensor([5.0]))
        result = {
            "gradient": lambda: tape.gradient(y, x),
            "jvp": lambda: tape.jvp(y, x, tensor([1.0])),
            "jacobian": lambda: tape.jacobian(y, x)[0],
            "gradient of jvp": lambda: outer.gradient(y, x),
        }[method]()
        np.testing.assert_allclose(result.numpy(), [90.0 if method == "gradient of jvp" else 27.0])

    def test_under_no_grad_a_result_is_plain(self):
        x, v = tensor([3.0]), variable([2.0])
        with torch.no_grad(), kg.GradientTape() as tape:
            tape.watch(x)
            slope = tape.gradient(x * x * v, x)
        np.testing.assert_allclose(slope.numpy(), [12])

    def test_zeros_without_memory_become_plain(self):
        """The second derivative of the absolute value is a tensor that NumPy cannot read."""
        x = tensor([3.0, -2.0])
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = ops.sum(ops.abs(x))
            sign = tape.gradient(y, x)
        np.testing.assert_array_equal(outer.gradient(sign, x).numpy(), [0, 0])


class TestAssignment:
    """torch overwrites a variable in place: an error, never a wrong value."""

    @pytest.mark.parametrize("method", ["gradient", "jvp", "jacobian"])
    def test_the_error(self, method):
        v = variable([2.0])
        with kg.GradientTape() as tape:
            y = v * v
        v.assign([10.0])
        arguments = [tensor([1.0])] if method == "jvp" else []
        with pytest.raises(RuntimeError, match=r"overwritten.*before `assign`.*Received: .*inplace operation"):
            getattr(tape, method)(y, v, *arguments)

    def test_of_the_other_factor(self):
        """Only x was kept for the gradient by v, and only v for the gradient by x."""
        x, v, constant = tensor(3.0), variable(2.0), tensor(5.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            by_v = constant * v
            by_both = x * v
        v.assign(10.0)
        close(tape.gradient(by_v, v), 5)
        with pytest.raises(RuntimeError, match="overwritten"):
            tape.gradient(by_both, x)

    def test_of_what_a_custom_gradient_has_read(self):
        v, x = variable(2.0), tensor(3.0)

        @custom_gradient
        def scaled(x):
            weight = v.value
            return x * weight, lambda upstream: upstream * weight

        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = scaled(x)
        close(tape.gradient(y, x), 2)
        v.assign(10.0)
        with pytest.raises(RuntimeError, match="overwritten"):
            tape.gradient(y, x)

    def test_of_an_argument_of_a_custom_gradient(self):
        v = variable(2.0)

        @custom_gradient
        def square(x):
            return x * x, lambda upstream: upstream * 2 * x

        with kg.GradientTape() as tape:
            y = square(v)
        v.assign(10.0)
        with pytest.raises(RuntimeError, match="overwritten"):
            tape.gradient(y, v)


class TestCustomGradient:
    def test_second_derivative(self):
        @custom_gradient
        def log1pexp(x):
            e = ops.exp(x)
            return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))

        x = tensor([1.0, 1.0])
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = log1pexp(x)
            slope = tape.gradient(y, x)
        close(slope, [0.731059, 0.731059])
        close(outer.jacobian(slope, x), np.diag([0.196612, 0.196612]))

    def test_a_value_returned_unchanged(self):
        identity = backend.custom_gradient(lambda x: ([x], lambda upstream: [-upstream]))
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            (y,) = identity(x)
            z = x * y
        assert y is not x
        close(tape.gradient(z, x), 0)

    def test_a_value_that_is_not_used(self):
        both = backend.custom_gradient(lambda x: ([x * 2, x * 3], lambda a, b: [7 * a + 11 * b]))
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            _, y = both(x)
        close(tape.gradient(y, x), 11)


@pytest.fixture
def double_precision(monkeypatch):
    """Lets Keras compute in double precision: on torch its operations cast what is double down."""
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    # Keras fixes its global policy at the first use of one, and from then on the default does not follow.
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_floatx(floatx)


@pytest.mark.usefixtures("double_precision")
class TestSecondDerivativeOfFusedKernels:
    def gradient_penalty(self, fun, x):
        """The gradient by `x` of |dy/dx|^2 / 2, and its slope by central differences in one direction."""
        direction = np.random.default_rng(1).normal(size=x.shape)

        def penalty(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = ops.sum(ops.sin(fun(x)))
            return ops.sum(tape.gradient(y, x) ** 2) / 2

        point = tensor(x, "float64")
        with kg.GradientTape() as tape:
            tape.watch(point)
            value = penalty(point)
        given = np.sum(ops.convert_to_numpy(tape.gradient(value, point)) * direction)
        up, down = (float(penalty(tensor(x + h * direction, "float64")).detach()) for h in (1e-5, -1e-5))
        return given, (up - down) / 2e-5

    @pytest.mark.parametrize("flash", [None, False])
    @pytest.mark.parametrize("masked", ["", "causal", "mask"])
    def test_second_derivative_of_attention(self, flash, masked):
        keras.utils.set_random_seed(0)
        layer = keras.layers.MultiHeadAttention(2, 4, flash_attention=flash)
        mask = np.array([[[1, 0, 1], [1, 1, 0], [0, 0, 1]]] * 2, bool)
        options = {"": {}, "causal": {"use_causal_mask": True}, "mask": {"attention_mask": mask}}[masked]
        x = np.random.default_rng(0).normal(size=(2, 3, 4))
        given, slope = self.gradient_penalty(lambda x: layer(x, x, **options), x)
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(given, slope, rtol=1e-6)

    def test_second_derivative_of_grouped_attention(self):
        keras.utils.set_random_seed(0)
        layer = keras.layers.GroupQueryAttention(4, 4, 2)
        x = np.random.default_rng(0).normal(size=(2, 3, 4))
        given, slope = self.gradient_penalty(lambda x: layer(x, x), x)
        np.testing.assert_allclose(given, slope, rtol=1e-6)

    def test_second_derivative_of_a_wrapped_torch_module(self):
        torch.manual_seed(0)
        module = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu").double()
        layer = keras.layers.TorchModuleWrapper(module)
        x = np.random.default_rng(0).normal(size=(2, 3, 4))
        given, slope = self.gradient_penalty(layer, x)
        np.testing.assert_allclose(given, slope, rtol=1e-5)


class TestFusedKernels:
    @pytest.mark.parametrize("options", ["", "causal", "boolean", "additive", "empty row", "scale", "grouped"])
    def test_the_same_values_as_the_fused_attention(self, options):
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(2, 4, 5, 8, generator=generator)
        k, v = torch.randn(2, 2, 4, 5, 8, generator=generator)
        mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
        mask[..., 0] = True
        if options == "empty row":
            mask[0, 0, 0] = False
        kwargs = {
            "": {},
            "causal": {"is_causal": True},
            "additive": {"attn_mask": mask * 0.5},
            "scale": {"scale": 0.3},
            "grouped": {"enable_gqa": True},
        }.get(options, {"attn_mask": mask})
        if options == "grouped":
            k, v = k[:, :2], v[:, :2]
        attention = torch.nn.functional.scaled_dot_product_attention
        expected = attention(q, k, v, **kwargs)
        with fused._MathAttention():
            given = attention(q, k, v, **kwargs)
        close(given, expected.numpy(), rtol=1e-5)

    def test_dropout_in_attention(self):
        """It draws the same numbers as without a tape."""
        keras.utils.set_random_seed(0)
        layer = keras.layers.MultiHeadAttention(2, 4, dropout=0.5, seed=1)
        x = tensor(np.random.default_rng(0).normal(size=(2, 3, 4)))
        layer(x, x)

        def values(tape):
            torch.manual_seed(0)
            layer._dropout_layer.seed_generator.state.assign([1, 0])
            with tape:
                return ops.convert_to_numpy(layer(x, x, training=True))

        np.testing.assert_allclose(values(kg.GradientTape()), values(contextlib.nullcontext()), rtol=1e-5)

    def test_the_fused_kernel_is_back_after_the_block(self):
        q = torch.ones(1, 1, 2, 4, requires_grad=True)
        attend = keras.ops.dot_product_attention
        with kg.GradientTape():
            inside = attend(q, q, q)
        outside = attend(q, q, q)
        assert "ScaledDotProduct" not in _names(inside)
        assert "ScaledDotProduct" in _names(outside)


def _names(tensor):
    """The names of all nodes that `tensor` was computed by."""
    names, stack = [], [tensor.grad_fn]
    while stack:
        node = stack.pop()
        names.append(node.name())
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return " ".join(names)


class TestVectorized:
    def test_a_function_that_cannot_be_is_computed_row_by_row(self):
        pullbacks.warn_unvectorized.cache_clear()

        class Branching(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient * (3 if gradient.sum().item() > 0 else 5)

        x = tensor([1.0, 2.0])
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = Branching.apply(x)
        with pytest.warns(UserWarning, match="cannot vectorize") as warned:
            close([tape.jacobian(y, x), tape.jacobian(y, x)], [3 * np.eye(2)] * 2)
        assert sum("cannot vectorize" in str(w.message) for w in warned) == 1


class TestShapeInference:
    """Keras builds with tensors that have no values, and cuts the graph there at every operation."""

    def test_gradients_are_connected(self):
        shapes = []

        class SquaredGradient(keras.layers.Layer):
            def build(self, shape):
                self.scale = self.add_weight(shape=(shape[-1],), name="scale")

            def call(self, x):
                with kg.GradientTape(persistent=True) as tape:
                    tape.watch(x)
                    y = ops.sum(x * x * self.scale)
                gradients = tape.gradient(y, [x, self.scale])
                shapes.append([None if g is None else tuple(g.shape) for g in gradients])
                return sum(g for g in gradients if g is not None)

        inputs = keras.Input((3,), batch_size=2)
        layer = SquaredGradient()
        outputs = layer(inputs)
        assert shapes == [[(2, 3), (3,)]]
        assert outputs.shape == (2, 3)
        layer.scale.assign([1.0, 2.0, 3.0])
        x = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
        close(keras.Model(inputs, outputs)(tensor(x)), 2 * x * [1, 2, 3] + np.sum(x**2, axis=0))


class TestMemory:
    @pytest.fixture(autouse=True)
    def _without_garbage_collector(self):
        """There are no cycles: what is dropped is freed."""
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def record(self, x, v):
        tape = backend.Tape(True)
        tape.__enter__()
        tape.watch(x)
        hidden = x * v
        (y,) = backend.custom_gradient(lambda h: ([h * h], lambda u: [u * 2 * h]))(hidden)
        tape.__exit__()
        return tape, hidden, y

    def test_nothing_is_held_once_tape_and_results_are_dropped(self):
        x, v = tensor(np.ones(3)), variable(np.ones(3))
        tape, hidden, y = self.record(x, v)
        results = [
            *backend.pullback(tape, [y], [x, v, hidden], [x]),
            *backend.pushforward(tape, [y], [x, v], [x, x]),
            *backend.pullback_batch(tape, [y], [x, v], [torch.eye(3)]),
        ]
        held = [weakref.ref(t) for t in (hidden, y, tape, *results)]
        del tape, hidden, y, results
        assert [ref() for ref in held] == [None] * len(held)

    def test_a_released_tape_holds_nothing(self):
        x, v = tensor(np.ones(3)), variable(np.ones(3))
        tape, hidden, y = self.record(x, v)
        backend.pullback(tape, [y], [x], [x])
        tape.release()
        held = [weakref.ref(t) for t in (x, hidden, y)]
        del x, hidden, y
        assert [ref() for ref in held] == [None] * 3
        assert tape.watched_variables()[0] is v

    def test_a_released_tape_lets_go_of_what_a_stateless_scope_lent(self):
        v, lent = variable(np.ones(3)), tensor(np.ones(3)) * 2
        tape = backend.Tape(True)
        tape.__enter__()
        with keras.StatelessScope(state_mapping=[(v, lent)]):
            y = v * v
        tape.__exit__()
        close(backend.pullback(tape, [y], [v], [tensor(np.ones(3))]), [[4, 4, 4]])
        tape.release()
        held = weakref.ref(lent)
        del lent, y
        assert held() is None
        assert tape.watched_variables()[0] is v

    def test_many_tapes(self):
        layer = keras.layers.Dense(2)
        x = tensor(np.ones((2, 3)))
        layer(x)

        def run():
            for _ in range(300):
                with kg.GradientTape() as outer:
                    outer.watch(x)
                    with kg.GradientTape() as tape:
                        tape.watch(x)
                        y = ops.sum(ops.tanh(layer(x)))
                    slope = tape.gradient(y, x)
                outer.gradient(slope, [x, layer.kernel])
            gc.collect()
            return sum(issubclass(type(o), (torch.Tensor, windows.Windows)) for o in gc.get_objects())

        assert run() == run()
        assert not borrowing._borrowed
        assert not active_tapes()


def test_the_parameters_of_a_wrapped_module():
    """A torch module reads its parameters past Keras."""
    layer = keras.layers.TorchModuleWrapper(torch.nn.Linear(2, 1))
    x = tensor([[1.0, 2.0], [3.0, 4.0]])
    layer(x)
    with kg.GradientTape() as tape:
        y = ops.sum(layer(x))
    close(tape.gradient(y, layer.trainable_variables), [[[4.0, 6.0]], [2.0]])


def test_weights_that_processes_share_out_have_no_sums(monkeypatch, tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        shared = distributed.tensor.distribute_tensor(torch.ones(2), mesh, [distributed.tensor.Shard(0)])
        monkeypatch.setattr(distributed, "get_world_size", lambda *args: 2)
        with pytest.raises(RuntimeError, match="weights that are split between processes .*ModelParallel.* Use"):
            backend.summed_over_processes([torch.ones(2), shared], 1)
    finally:
        monkeypatch.undo()
        distributed.destroy_process_group()


class TestDeterminantOfASingularMatrix:
    """torch goes by the inverse: to it the gradient is zero and the Hessian NaN."""

    @pytest.mark.parametrize("rank", [0, 1, 2, 3])
    def test_gradient_is_the_matrix_of_cofactors(self, rank):
        a = np.diag([2.0, -1.0, 3.0][:rank] + [0.0] * (3 - rank)) @ np.array([[1.0, 2, 0], [0, 1, 0], [1, 0, 1]])
        minors = [[np.delete(np.delete(a, i, 0), j, 1) for j in range(3)] for i in range(3)]
        cofactors = (-1.0) ** np.add.outer(range(3), range(3)) * np.linalg.det(minors)
        close(kg.grad(ops.det)(tensor(a)), cofactors, atol=1e-5)
        close(kg.grad(lambda a: ops.sum(ops.det(a)))(tensor([a, np.eye(3)])), [cofactors, np.eye(3)], atol=1e-5)

    def test_hessian_of_a_diagonal(self):
        """Of the product of three numbers, two of them zero."""

        def det(x):
            return ops.det(ops.diag(x))

        close(kg.hessian(det)(tensor([0.0, 0.0, 3.0])), [[0, 3, 0], [3, 0, 0], [0, 0, 0]])
