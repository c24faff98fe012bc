"""Reports on models with one fault each: the findings, what is left out, and what is refused."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.diagnostics.model_report import checks
from keras_gradtools.diagnostics.model_report import report as module
from tests.diagnostics.model_report import models
from tests.diagnostics.model_report.models import X, Y

report = kg.diagnostics.report


def names(found):
    return [finding.name for finding in found.findings]


def section(found, name):
    (one,) = [s for s in found.sections if s.name == name]
    return one


@pytest.fixture(scope="module")
def full():
    return report(models.good(), (X, Y), verbose=0)


def test_a_good_model(full):
    assert [s.status for s in full.sections] == ["done"] * len(module.NAMES), str(full)
    assert not [f for f in full.findings if f.severity == "error"], str(full)
    assert section(full, "robustness").measured["accuracy"] == pytest.approx(np.mean((X @ _kernel()).argmax(1) == Y))


def _kernel():
    return np.array([[2.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.5]])


def test_the_jacobian_of_a_linear_model(full):
    size = np.linalg.norm(_kernel(), 2) * np.sqrt(np.mean(X**2)) / np.sqrt(np.mean((X @ _kernel()) ** 2))
    assert section(full, "jacobian").measured["relative_gain"] == pytest.approx(size, rel=1e-4)


def test_what_it_says(full):
    assert full.model == "good" and "12" in full.facts["examples"] and "10 weights" in full.facts["model"]
    assert "in 7 of 7 checks" in str(full) and repr(full).startswith("<Report on 'good'")
    assert "Gradient flow" in full._repr_html_() and "reason" not in full._repr_html_()


@pytest.mark.fast_on("torch")
@pytest.mark.parametrize(
    ("make", "check", "expected"),
    [
        (models.normalized, "independence", ["mixed_in_training"]),
        (models.dead, "gradients", ["mostly_dead"]),
        (models.vanishing, "gradients", ["vanishing_gradient"]),
        (models.vanishing, "jacobian", ["no_influence"]),
        (models.overflowing, "values", ["not_finite_outputs"]),
        (lambda: models.good(rate=1e4), "curvature", ["unstable_rate"]),
    ],
)
def test_faults(make, check, expected):
    found = report(make(), (X, Y), checks=[check], verbose=0)
    assert names(found) == expected and section(found, check).status == "done", str(found)


def test_evidence_names_the_layer():
    (finding,) = report(models.dead(), (X, Y), checks="gradients", verbose=0).findings
    assert "60% of 'hidden'" in finding.evidence
    (finding,) = report(models.normalized(), (X, Y), checks="independence", verbose=0).findings
    assert "'norm'" in finding.evidence


def test_an_overflow_ends_no_other_check():
    found = report(models.overflowing(), (X, Y), checks=["values", "jacobian", "gradients", "robustness"], verbose=0)
    assert "not_finite_outputs" in names(found) and "not_finite_gradient" in names(found)
    assert section(found, "jacobian").status == "failed" and "finite" in section(found, "jacobian").remark
    assert "Jacobian failed: " in str(found)


def test_without_labels():
    found = report(models.good(), X, checks=["values", "gradients", "curvature", "robustness"], verbose=0)
    assert [s.status for s in found.sections] == ["done"] + ["not run"] * 3
    assert "no labels" in str(found)


def test_without_a_loss():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    found = report(model, (X, Y), checks=["gradients"], verbose=0)
    assert "not compiled with a loss" in section(found, "gradients").remark
    given = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert section(report(model, (X, Y), given, checks=["gradients"], verbose=0), "gradients").status == "done"


@pytest.mark.parametrize(("loss", "y", "why"), [("mse", X[:, :2], "'mse'"), (None, Y + 5, "expects classes from 0")])
def test_robustness_is_for_classifiers(loss, y, why):
    found = report(models.good(loss=loss), (X, y), checks=["robustness"], verbose=0)
    assert section(found, "robustness").status == "not run" and why in section(found, "robustness").remark


def test_several_inputs_by_name():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Concatenate()([a, b])), name="two")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = report(model, ({"a": X, "b": X}, Y), checks=["values", "gradients", "robustness"], verbose=0)
    assert [s.status for s in found.sections] == ["done", "done", "not run"]
    assert "one floating-point input" in section(found, "robustness").remark


def test_examples_are_drawn():
    found = report(models.good(), (X, Y), examples=5, checks=["values"], verbose=0)
    assert found.facts["examples"] == "5 of 12, drawn at random"
    assert section(found, "values").measured["examples"] == 5


def test_a_wrapper_is_examined_inside():
    wrapper = kg.models.InputGradientRegularized(models.good(), weight=0.1)
    wrapper.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = report(wrapper, (X, Y), checks=["values", "gradients"], verbose=0)
    assert found.model == "good" and [s.status for s in found.sections] == ["done"] * 2


def test_time_is_limited(monkeypatch):
    found = report(models.good(), (X, Y), checks=["values", "jacobian"], max_seconds=1e-9, verbose=0)
    assert [s.status for s in found.sections] == ["not run"] * 2 and "the limit of 1e-09 seconds" in str(found)
    assert "reason" in found._repr_html_() and "the limit of 1e-09 seconds" in found._repr_html_()


def test_the_model_does_not_change():
    model = models.normalized()
    before = model.get_weights()
    report(model, (X, Y), checks=["independence", "gradients"], verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_range_of_pixels():
    subjects = [
        module.Subject(models.good(), (x, Y), None, 64, 0, clip) for x, clip in ((X, None), (3 * X, None), (X, (-1, 2)))
    ]
    assert [s.clip for s in subjects] == [(0.0, 1.0), None, (-1, 2)]


def test_heavy_ball_is_stable_for_larger_rates():
    model = models.good()
    model.compile(keras.optimizers.SGD(0.5, momentum=0.5), "mse")
    assert checks._stable_rate(model) == (0.5, 3.0)
    model.compile("adam", "mse")
    assert checks._stable_rate(model) is None


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((X * np.nan, Y), "finite data. Received: NaN or infinity in `x`"),
        ((X, X + np.inf), "NaN or infinity in `y`"),
        ((X, Y[:3]), "one number of examples"),
        ((X[:1], Y[:1]), "two examples or more"),
        ((X[:, :3], Y), r"of the shapes .*\(None, 4\).*Received: `x` of the shapes \[\(12, 3\)\]"),
        ("abc", "arrays or tensors in `data`"),
        ((), "as `data`"),
        ((X, Y, Y, Y), "as `data`"),
    ],
)
def test_data_are_refused(data, match):
    with pytest.raises(ValueError, match=f"report expects .*{match}"):
        report(models.good(), data, verbose=0)


def test_weights_with_nan_are_refused():
    model = models.good()
    model.set_weights([w * np.nan for w in model.get_weights()])
    with pytest.raises(ValueError, match=r"expects finite weights. Received: NaN or infinity in good/out/kernel"):
        report(model, (X, Y), verbose=0)


@pytest.mark.parametrize(
    "options",
    [
        {"checks": "abc"},
        {"checks": []},
        {"checks": [3]},
        {"examples": 1},
        {"max_seconds": 0},
        {"seed": -1},
        {"clip": (1, 0)},
        {"clip": 3},
        {"verbose": "loud"},
    ],
    ids=str,
)
def test_options_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"report expects .* as `{name}`. Received: {name}="):
        report(models.good(), (X, Y), **options)


def test_progress(capsys):
    report(models.good(), (X, Y), checks=["values", "independence"], verbose=1)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "report on 'good': started, 2 checks" and "2/2 checks" in last
