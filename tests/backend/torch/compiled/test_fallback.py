"""Compiled functions on torch: what a program cannot repeat runs eagerly, with the right result and one warning."""

import threading
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

from tests.backend.torch.compiled.replays import assert_equal_to_eager, several  # noqa: E402

GENERATOR = np.random.default_rng(0)


def first_moment(log_probabilities):
    lengths = torch.full((2,), 3) + (log_probabilities.sum((0, 2)) > 0)
    labels = torch.ones(2, 1, dtype=torch.int64)
    return torch.nn.functional.ctc_loss(log_probabilities, labels, lengths, torch.ones(2, dtype=torch.int64))


def through_dlpack(x):
    return torch.from_dlpack(np.from_dlpack(x.detach())) * 2


def with_new_data(x):
    y = x * 1.0
    y.data = x * 2
    return y


def backward(x):
    FACTOR.grad = None
    ops.sum(FACTOR * x).backward()
    return FACTOR.grad * 1.0


def total(x):
    found = torch.zeros(x.shape[-1])
    found.add_(x.sum(0))
    return 2 * found


def seen_by_numpy(x):
    found = torch.zeros(3)
    array = found.numpy()
    found.add_(x[0])
    return x * float(array.sum())


def written_by_numpy(x):
    found = torch.zeros(3)
    found.numpy()[:] = 2.0
    return x * found


FACTOR = torch.ones(3, requires_grad=True)
# Each function, and what the warning says.
ROWS = {
    "float": (lambda x: x * float(ops.sum(x)), r"float\(x\)"),
    "float of what was constant": (lambda x: x * float(total(x).sum()), r"float\(x\)"),
    "memory that NumPy sees": (seen_by_numpy, "shares with NumPy"),
    "memory that NumPy changes": (written_by_numpy, "shares with NumPy"),
    "int": (lambda x: x * int(ops.sum(x)), r"int\(x\)"),
    "item": (lambda x: x * x.sum().item(), r"x.item\(\)"),
    "if of a number": (lambda x: x * 2 if ops.sum(ops.relu(x - 0.5)) else x, "if x:"),
    "numpy": (lambda x: x * x.numpy().sum(), r"numpy\(\)"),
    "asarray": (lambda x: x * torch.from_numpy(2 * np.asarray(x)), r"numpy\(\)"),
    "convert_to_numpy": (lambda x: x * torch.from_numpy(2 * ops.convert_to_numpy(x)), r"numpy\(\)"),
    "tolist": (lambda x: x * torch.tensor(x.tolist()), r"tolist\(\)"),
    "repr": (lambda x: x * len(repr(x.sum())), r"repr\(\)"),
    "allclose": (lambda x: x * torch.equal(x[0], x[1]), "operation `equal`"),
    "nonzero": (lambda x: torch.nonzero(x > 0), "operation `nonzero`"),
    "mask": (lambda x: x[x > 0], "`aten::index` depends on the values"),
    "unique": (lambda x: torch.unique(x), "depends on the values"),
    "repeat_interleave": (lambda x: x[0].repeat_interleave((x[0] > 0).long()), "depends on the values"),
    "data": (with_new_data, "assignment to `.data`"),
    "resize": (lambda x: (x * 1.0).resize_(2, 2), "operation `resize_`"),
    "manual_seed": (lambda x: (torch.manual_seed(3), x * torch.rand(3))[1], "sets the state"),
    "generator": (lambda x: x * torch.rand(3, generator=torch.Generator().manual_seed(1)), "torch.Generator"),
    "backward": (backward, r"calls `backward\(\)`, which sets `grad` of a tensor that is no Keras variable's value"),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_gives_values_to_python(name):
    fun, words = ROWS[name]
    arguments = several(2, 3, count=4)
    assert_equal_to_eager(lambda: fun, arguments, runs=None)
    with pytest.warns(UserWarning, match=f"`kg.jit` runs .* eagerly, which is slower: .*{words}") as caught:
        compiled = kg.jit(lambda x: fun(x))
        for args in arguments:
            compiled(*args)
    assert len([w for w in caught if "eagerly" in str(w.message)]) == 1


def test_ctc_loss():
    logits = several(4, 2, 3, count=4)
    assert_equal_to_eager(lambda: lambda x: first_moment(torch.log_softmax(x, -1)), logits, runs=None)


def test_lengths_of_a_split():
    def fun(x):
        return torch.tensor_split(x, (x[:1, 0] > 0).long() + 1)[0]

    assert_equal_to_eager(lambda: fun, several(4, 3), runs=None)


def test_memory_that_is_shared_with_numpy():
    assert_equal_to_eager(lambda: through_dlpack, several(2, 3), runs=None)


class TestWhatChangesFromCallToCall:
    """It is neither an argument nor a Keras variable, so two calls differ."""

    def runs_eagerly(self, fun, expected, words="changes from call to call"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled = kg.jit(fun)
            for n in range(8):
                close(compiled(torch.ones(2)), expected(n))
        assert len([w for w in caught if words in str(w.message)]) == 1

    def test_numbers_that_numpy_draws(self):
        numbers = np.random.default_rng(5).normal(size=8)
        generator = np.random.default_rng(5)
        self.runs_eagerly(lambda x: x * generator.normal(), lambda n: [numbers[n]] * 2)

    def test_arrays_that_numpy_draws(self):
        numbers = np.random.default_rng(5).normal(size=(8, 2))
        generator = np.random.default_rng(5)
        self.runs_eagerly(
            lambda x: x * ops.convert_to_tensor(generator.normal(size=2), "float32"), lambda n: numbers[n]
        )

    def test_a_counter_behind_getattr(self):
        class Counter:
            n = 0

        def fun(x):
            Counter.n += 1
            return x * getattr(Counter, "n")  # noqa: B009

        self.runs_eagerly(fun, lambda n: [n + 1.0] * 2)

    def test_a_tensor_that_is_made_elsewhere(self):
        values = iter([torch.full((2,), float(n)) for n in range(8)])
        self.runs_eagerly(lambda x: x * next(values), lambda n: [float(n)] * 2)


class TestCapturedTensors:
    def test_that_are_changed_in_place(self):
        total = torch.zeros(2)
        compiled = kg.jit(lambda x: total.add_(x) * 1.0)
        with pytest.warns(UserWarning, match="changes a tensor in place that is no argument"):
            for n in range(4):
                close(compiled(torch.ones(2)), [n + 1.0] * 2)

    def test_that_require_gradients(self):
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        compiled = kg.jit(lambda x: ops.sum(w**2 * x))
        with pytest.warns(UserWarning, match="captures a tensor that requires gradients"):
            for _ in range(4):
                (gradient,) = torch.autograd.grad(compiled(torch.ones(2)), w)
                close(gradient, [2.0, 4.0])

    def test_with_respect_to_which_it_is_differentiated(self):
        w = torch.tensor([1.0, 2.0])
        compiled = kg.jit(lambda x: kg.grad(lambda w: ops.sum(w**2 * x))(w))
        for _ in range(4):
            close(compiled(torch.ones(2)), [2.0, 4.0])


def test_a_failing_first_call():
    failures = [RuntimeError("mine")]

    def fun(x):
        if failures:
            raise failures.pop()
        return kg.grad(lambda x: ops.sum(x**2))(x)

    compiled = kg.jit(fun)
    with pytest.raises(RuntimeError, match="mine"):
        compiled(torch.ones(2))
    for _ in range(4):
        close(compiled(torch.ones(2)), [2.0, 2.0])
    assert torch._C._is_multithreading_enabled() and not torch._C._len_torch_dispatch_stack()


def test_a_captured_tensor_that_was_replaced_where_nothing_looks():
    class Holder:
        pass

    holder = Holder()
    holder.value = torch.tensor([1.0, 2.0])
    compiled = kg.jit(lambda x: x * getattr(holder, "value"))  # noqa: B009
    for _ in range(4):
        close(compiled(torch.ones(2)), [1.0, 2.0])
    holder.value = torch.tensor([3.0, 4.0])
    for _ in range(4):
        close(compiled(torch.ones(2)), [3.0, 4.0])


def test_functions_of_torch_compile_are_compiled_after_a_recorded_call():
    compilations = []

    def compiler(graph, inputs):
        compilations.append(inputs)
        return graph.forward

    function, x = torch.compile(lambda x: torch.sum(x.sin() * x), backend=compiler), ops.convert_to_tensor([1.0, 2.0])
    doubled = kg.jit(lambda x: 2 * function(x))
    values = [doubled(x) for _ in range(4)]
    assert not compilations
    expected = function(x)
    assert len(compilations) == 1
    for value in values:
        close(value, 2 * expected)


def test_functions_of_torch_compile_are_compiled_after_calls_recorded_on_several_threads():
    _ = torch._dynamo  # Only once it is imported can a function of `torch.compile` exist.
    both_record, first_is_done = threading.Barrier(2), threading.Event()

    def first(x):
        both_record.wait(60)
        return x + 1

    def second(x):
        both_record.wait(60)
        assert first_is_done.wait(60)
        return x + 1

    def run_first():
        kg.jit(first)(torch.ones(2))
        first_is_done.set()

    threads = [threading.Thread(target=run_first), threading.Thread(target=kg.jit(second), args=(torch.ones(2),))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compilations = []
    torch.compile(lambda x: x.sin(), backend=lambda graph, inputs: compilations.append(inputs) or graph.forward)(
        torch.ones(2)
    )
    assert len(compilations) == 1


@pytest.mark.parametrize("transform", [kg.jit, kg.jacobian, kg.batch_jacobian], ids=["jit", "jacobian", "batch"])
def test_transforms_inside_a_function_of_torch_compile(transform):
    x = ops.convert_to_tensor([[1.0, 2.0]])

    def fun(x):
        return 2 * transform(lambda x: x**3)(x)

    expected = fun(x)
    compiled = torch.compile(fun, backend="eager")
    for _ in range(4):
        close(compiled(x), expected)
