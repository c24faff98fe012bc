"""The atlas: nothing of Keras is left out of it, and a derivative that is wrong is seen."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.atlas import all_cases, derivatives, layer_cases, operations, table
from tests.atlas.cases import Case
from tests.atlas.reference import slope


def test_every_operation_has_its_place():
    named = {name.split(" ")[0] for name in operations.OPERATIONS} | operations.WITHOUT_DERIVATIVE
    assert operations.names() - named == set()


def test_every_layer_has_its_place():
    named = set(layer_cases.LAYERS) | layer_cases.WITHOUT_DERIVATIVE
    assert layer_cases.names() - named == set()


class TestSlope:
    def test_of_a_smooth_function(self):
        found = slope(lambda t: np.array([np.sin(0.3 + t), np.exp(2 * t)]))
        np.testing.assert_allclose(found.low, [np.cos(0.3), 2], rtol=1e-7)
        assert found.is_smooth and found.judge([np.cos(0.3), 2.0]) == "right"
        assert found.judge([np.cos(0.3), 2.001]).startswith("wrong")

    def test_of_a_kink_lies_between_both_sides(self):
        found = slope(lambda t: np.abs(t) * np.ones(1))
        assert [found.judge([x]) for x in (-1.0, 0.0, 0.5, 1.0)] == ["right"] * 4
        assert found.judge([1.1]).startswith("wrong") and found.judge([np.nan]) == "NaN"

    def test_at_a_pole_is_infinite(self):
        found = slope(lambda t: np.array([np.cbrt(t)]))
        assert found.is_infinite and found.judge([np.inf]) == "right" and found.judge([3.0]).startswith("wrong")

    def test_at_the_end_of_a_domain_is_that_of_one_side(self):
        with np.errstate(invalid="ignore"):
            found = slope(lambda t: np.array([np.log1p(t) if t >= 0 else np.nan]))
        np.testing.assert_allclose(found.low, [1.0], rtol=1e-6)

    def test_where_the_function_jumps_there_is_none(self):
        found = slope(lambda t: np.array([np.sign(t)]))
        assert found.jumps and found.judge([0.0]) == "unknown"


# In double precision alone, a difference of second derivatives is worth comparing.
@pytest.mark.float64
class TestExamine:
    def test_a_wrong_gradient_is_seen(self):
        wrong = kg.custom_gradient(lambda x: (ops.sin(x), lambda upstream: upstream * ops.cos(x) * 1.01))
        found = derivatives.examine(Case("wrong", "generic", wrong, (np.array([0.3, 0.4]),)))
        assert all(found[name].startswith("wrong") for name in ("tape", "jvp", "jit", "jacobian, reverse"))

    def test_a_right_one_too(self):
        found = derivatives.examine(
            Case("right", "generic", lambda x, y: ops.sin(x) * y, (np.array([0.3]), np.ones(2)))
        )
        assert found == dict.fromkeys(derivatives.CHECKS, "right")


class TestTable:
    def test_the_order_of_a_row_is_that_of_all_generic_points(self):
        right = dict.fromkeys(derivatives.CHECKS, "right")
        assert table.summary({"generic": right, "zeros": {"value": "not finite"}}) == "3"
        assert table.summary({"generic": right, "generic 2": {**right, "third": "error: none"}}) == "2, then an error"
        assert table.summary({"generic": right, "ties": {**right, "hvp": "NaN"}}) == "3, NaN"
        assert table.summary({"generic": {**right, "hvp": "wrong: 1"}}) == "3, ***wrong***"


@pytest.mark.slow
def test_no_cell_is_wrong(backend):
    """What was run last and committed; `python -m tests.atlas.run` runs it anew."""
    results = table.read(backend)
    assert {case.name for case in all_cases.cases()} <= results.keys()
    assert table.counts(results)[-1] == 0


class Around(keras.Model):
    """A model of one layer."""

    def __init__(self, entry):
        super().__init__()
        self.layer, self._call = entry.make(), entry.call

    def call(self, inputs, training=None):
        return self._call(self.layer, *inputs) if self._call else self.layer(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(layer_cases.LAYERS))
def test_layer_derivatives_says_the_same(name, backend):
    """Of each layer at its generic points, at which `kg.diagnostics.layer_derivatives` reads it in single precision."""
    points = table.read(backend).get(f"layers.{name}", {})
    for i, entry in enumerate(layer_cases.LAYERS[name]):
        found = points.get(f"generic {i + 1}" if i else "generic")
        if not entry.inputs or found is None or "value" in found:
            continue
        model = Around(entry)
        x = tuple(ops.convert_to_tensor(np.asarray(array, "float32")) for array in entry.inputs)
        if name == "Normalization":
            # On TensorFlow, Keras builds it within a graph otherwise, and keeps that graph's tensors.
            model.layer.build(x[0].shape)
        model(x)
        report = kg.diagnostics.layer_derivatives(model, x, training=bool(entry.training))
        expected = (
            {"yes", "zero", "constant", "unclear"} if found["hvp"] == "right" else {"no", "once", "unclear", "constant"}
        )
        assert {layer.verdict for layer in report.layers} <= expected, (found, report)
