"""Each rule of a report on both sides of its threshold, and the order of findings."""

import math
import pathlib

import pytest

from keras_gradtools.diagnostics.model_report.findings import RULES, SEVERITIES, findings_of
from keras_gradtools.diagnostics.model_report.report import NAMES
from keras_gradtools.diagnostics.model_report.sections import Section

PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs" / "report.md"
NAN, INF = math.nan, math.inf


def sizes(first, last):
    return {"gradient_by_layer": {"a": first, "b": 1.0, "c": last}}


# For each rule, measurements for which it holds, with a part of the evidence, and some for which it does not.
CASES = {
    "not_finite_outputs": ([({"outputs_not_finite": 2, "examples": 9}, "2 of 9")], [{"outputs_not_finite": 0}]),
    "not_finite_loss": (
        [({"loss": NAN}, "nan"), ({"loss": INF, "outputs_not_finite": 0}, "inf")],
        [{"loss": 1.0}, {"loss": NAN, "outputs_not_finite": 1}],
    ),
    "not_finite_gradient": ([(sizes(NAN, 1.0), "'a'"), (sizes(1.0, INF), "'c'")], [sizes(1.0, 1.0)]),
    "zero_gradient": (
        [(sizes(0.0, 1.0), "exactly zero in 'a'"), ({"gradient_by_layer": {"a": 0.0}}, "All gradients")],
        [sizes(1e-30, 1.0)],
    ),
    "vanishing_gradient": (
        [(sizes(0.9e-4, 1.0), "9e-05 in 'a' and 1 in 'c'")],
        [sizes(1.1e-4, 1.0), sizes(0.0, 0.0), {"gradient_by_layer": {"a": 1e-9, "b": 1.0}}],
    ),
    "exploding_gradient": ([(sizes(1.1e4, 1.0), "1.1e+04 in 'a'")], [sizes(0.9e4, 1.0), sizes(NAN, 1.0)]),
    "mostly_dead": ([({"dead_units": {"a": 0.6, "b": 0.5}}, "60% of 'a'.")], [{"dead_units": {"a": 0.5}}]),
    "some_dead": ([({"dead_units": {"a": 0.2, "b": 0.1}}, "20% of 'a'.")], [{"dead_units": {"a": 0.1, "b": 0.6}}]),
    "noisy_gradient": (
        [({"noise_scale": 1001.0, "examples": 32}, "1e+03"), ({"noise_scale": INF, "examples": 40}, "is infinite")],
        [{"noise_scale": 999.0, "examples": 32}, {"noise_scale": NAN}, {"noise_scale": INF, "examples": 31}],
    ),
    "not_twice": ([({"not_twice": ["a", "b"]}, "'a', 'b' cannot")], [{"not_twice": []}]),
    "undecided_layers": ([({"unclear": list("abcdef")}, "'d' and 2 more")], [{"unclear": []}]),
    "mixed_in_inference": (
        [
            ({"independent_in_inference": False, "mixing_in_inference": ["a"]}, "'a'"),
            ({"independent_in_inference": False, "mixing_in_inference": []}, "outside of layers"),
        ],
        [{"independent_in_inference": True}, {"independent_in_inference": None}],
    ),
    "mixed_in_training": (
        [({"independent_in_training": False, "mixing_in_training": ["a"]}, "'a'")],
        [{"independent_in_training": True}, {"independent_in_training": False, "independent_in_inference": False}],
    ),
    "no_influence": ([({"relative_gain": 0.9e-3}, "0.0009")], [{"relative_gain": 1.1e-3}, {"relative_gain": NAN}]),
    "large_gain": ([({"relative_gain": 1100.0}, "1.1e+03 times")], [{"relative_gain": 900.0}]),
    "low_rank": (
        [({"effective_rank": 1.4, "rank": 4}, "1.40 of 4")],
        [{"effective_rank": 1.6, "rank": 4}, {"effective_rank": 1.0, "rank": 3}, {"effective_rank": 0.0, "rank": 9}],
    ),
    "unstable_rate": ([({"rate_over_limit": 1.5}, "1.5 times")], [{"rate_over_limit": 0.9}, {"rate_over_limit": None}]),
    "negative_curvature": (
        [({"smallest": -0.2, "largest": 1.0}, "-0.2, the largest 1")],
        [{"smallest": -0.05, "largest": 1.0}, {"smallest": NAN, "largest": NAN}],
    ),
    "flat_loss": ([({"smallest": 0.0, "largest": 0.0}, "zero")], [{"smallest": 0.0, "largest": 1.0}]),
    "easily_fooled": ([({"relative_distance": 0.04}, "0.04 standard")], [{"relative_distance": 0.06}]),
    "masked_gradients": ([({"masked_share": 0.2}, "20% of the examples")], [{"masked_share": 0.1}]),
}


def test_every_rule_has_a_case():
    assert [rule.name for rule in RULES] == list(CASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule(rule):
    holds, fails = CASES[rule.name]
    for measured, evidence in holds:
        found = rule.finding(measured)
        assert evidence in found.evidence and found.severity in SEVERITIES and found.section == rule.section
        assert found.advice in str(found) and found.title in str(found)
    for measured in [*fails, {}]:
        assert rule.finding(measured) is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_texts(rule):
    assert rule.section in NAMES
    for text in (rule.title, rule.reason, rule.advice):
        assert text.endswith(".") and text[0].isupper()
    assert not rule.threshold.endswith(".")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_is_documented(rule):
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"`{rule.name}`" in page and rule.threshold in page


def test_the_most_severe_come_first():
    sections = [
        Section("layers", "", "", measured={"unclear": ["a"], "not_twice": ["b"]}),
        Section("gradients", "", "", measured={"dead_units": {"a": 0.9, "b": 0.2}}),
    ]
    assert [f.name for f in findings_of(sections)] == ["mostly_dead", "not_twice", "some_dead", "undecided_layers"]
