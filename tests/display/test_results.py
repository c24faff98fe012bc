"""What results show of themselves: a short `repr`, and an escaped table in notebooks."""

import dataclasses
import enum
import html.parser
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.display.descriptions import short
from keras_gradtools.display.html import Table, fragment
from keras_gradtools.display.results import displayed

LONGEST_REPR = 600


class Reader(html.parser.HTMLParser):
    """The text of a page, its tags, and whether every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags, self._open = [], [], []
        self.feed(page)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.23456789, "1.23457"),
        (6.0, "6.0"),
        (np.float32(0.1), "0.1"),
        (float("nan"), "nan"),
        (np.int64(3), "3"),
        (True, "True"),
        (None, "None"),
        (Color.RED, "Color.RED"),
        ("a", "'a'"),
        (("a", 2), "('a', 2)"),
        (("a",), "('a',)"),
        ([], "[]"),
        (list(range(5)), "<5 x int>"),
        ([{}, 1], "<2 items>"),
        (np.array([1.0, 2.5]), "[1.0, 2.5]"),
        (np.array(2.5), "2.5"),
        (np.arange(12.0).reshape(3, 4), "<float64 (3, 4), 0.0 to 11.0>"),
        (np.array([np.nan] * 7 + [1.0]), "<float64 (8,), 1.0 to 1.0, 7 not finite>"),
        (np.full(9, np.inf), "<float64 (9,), none finite>"),
        (np.arange(8) < 3, "<bool (8,), 3 true>"),
        (np.zeros((0, 3)), "<float64 (0, 3)>"),
        (np.zeros((2, 2), "complex64"), "<complex64 (2, 2)>"),
    ],
)
def test_short(value, expected):
    assert short(value) == expected


def test_short_tensor_and_text():
    assert short(ops.ones((2, 3))) == "<float32 tensor (2, 3)>" or "float32" in short(ops.ones((2, 3)))
    assert len(short("a" * 5000)) == 200


def test_displayed_classes():
    @displayed
    class Named(NamedTuple):
        values: np.ndarray
        size: float

    @displayed
    @dataclasses.dataclass
    class Data:
        text: str

        def _parts(self):
            return ["said <b>so</b>", Table([("<i>", self.text)], ("a", "b"))]

    assert repr(Named(np.zeros(100), 2.0)) == "Named(values=<float64 (100,), 0.0 to 0.0>, size=2.0)"
    assert str(Data("x")) == repr(Data("x")) == "Data(text='x')"
    page = Reader(Data("<script>")._repr_html_())
    assert {"Data", "said <b>so</b>", "<i>", "<script>", "a", "b"} <= set(page.texts)
    assert not {"b", "i", "script"} & set(page.tags)
    assert {"values", "2.0"} <= set(Reader(Named(np.zeros(9), 2.0)._repr_html_()).texts)


def test_fragment_of_nothing():
    assert "title" in Reader(fragment("title", [])).texts


@pytest.fixture(scope="module")
def model():
    made = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, "tanh", name="a"), layers.Dense(2, "softmax", name="b")], name="net"
    )
    made.compile("sgd", "sparse_categorical_crossentropy")
    return made


X = np.random.default_rng(0).uniform(0.2, 0.8, (6, 3)).astype("float32")
Y = np.array([0, 1, 0, 1, 0, 1])


def results(model):
    hessian = kg.curvature.Hessian(model, None, (X, Y), verbose=0)
    density = kg.curvature.spectral_density(np.diag(np.arange(9.0)), probes=2)
    line = np.linspace(-1, 1, 30)
    step = kg.callbacks.NewtonStep((X, Y), solver="cg")
    model.fit(X, Y, verbose=0, callbacks=[step])
    return {
        "Estimate": kg.curvature.diagonal(np.diag(np.arange(20.0))),
        "SpectralDensity": density,
        "LossSurface": kg.curvature.LossSurface(line, line, line[:, None] * line, np.ones(2)),
        "ConjugateGradientsResult": kg.curvature.conjugate_gradients(np.eye(40), np.ones(40)),
        "DampedSolution": kg.curvature.damped_solve(np.eye(40), np.ones(40)),
        "NewtonStepResult": step.last_step,
        "JacobianSpectrum": kg.diagnostics.jacobian_spectrum(model, X),
        "LayerDerivatives": kg.diagnostics.layer_derivatives(model, verbose=0),
        "BatchIndependence": kg.diagnostics.batch_independence(model, X),
        "GradientNoise": kg.diagnostics.gradient_noise_scale(model, None, (X, Y)),
        "RobustnessReport": kg.attacks.robustness_report(model, X, Y, steps=1, verbose=0),
        "Hessian": hessian,
        "LinearCombination": 2 * hessian + hessian,
        "ProductOperator": hessian @ hessian,
        "LinearizedOperator": hessian.linearized(),
    }


@pytest.mark.fast_on("torch")
def test_every_result_shows_itself(model):
    for name, result in results(model).items():
        assert type(result).__name__ == name
        assert name in repr(result) and len(repr(result)) < LONGEST_REPR and "\n" not in repr(result), repr(result)
        page = Reader(result._repr_html_())
        assert name in page.texts and "table" in page.tags or name == "LayerDerivatives", page.texts


def test_contents(model):
    found = results(model)
    texts = Reader(found["Hessian"]._repr_html_()).texts
    assert "net" in texts and any("a/kernel (3, 4)" in text for text in texts) and "(26, 26)" in texts
    spectrum = found["JacobianSpectrum"]
    assert short(spectrum.spectral_norm.max()) in Reader(spectrum._repr_html_()).texts
    assert any("found by the attack" in text for text in Reader(found["RobustnessReport"]._repr_html_()).texts)
    assert any("can be differentiated twice" in text for text in Reader(found["LayerDerivatives"]._repr_html_()).texts)
    assert "reason=StepReason." in repr(found["NewtonStepResult"])


def test_layers_with_problems_are_in_the_table():
    verdict = kg.diagnostics.LayerVerdict("net/a", "keras.A", "once", "an error", "replace it")
    report = kg.diagnostics.LayerDerivatives("net", "here", (verdict,))
    assert {"net/a", "keras.A", "an error", "replace it"} <= set(Reader(report._repr_html_()).texts)
