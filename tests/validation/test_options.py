"""Checks of options: what they return, and what they say."""

import fractions

import keras
import numpy as np
import pytest

from keras_gradtools import validation


@pytest.mark.parametrize(
    ("checked", "expected"),
    [
        (lambda: validation.require_flag("f", "x", np.True_), True),
        (lambda: validation.require_count("f", "x", np.int64(3)), 3),
        (lambda: validation.require_count("f", "x", 0, least=0), 0),
        (lambda: validation.require_count("f", "x", None, may_be_none=True), None),
        (lambda: validation.require_seed("f", np.uint8(7)), 7),
        (lambda: validation.require_seed("f", None, may_be_none=True), None),
        (lambda: validation.require_number("f", "x", np.float32(0.5)), 0.5),
        (lambda: validation.require_number("f", "x", fractions.Fraction(1, 4), above=0, below=1), 0.25),
        (lambda: validation.require_number("f", "x", 0, least=0), 0.0),
        (lambda: validation.require_number("f", "x", None, may_be_none=True), None),
        (lambda: validation.require_choice("f", "x", "b", ("a", "b")), "b"),
        (lambda: validation.require_choice("f", "x", None, ("a", None)), None),
        (lambda: validation.require_verbose("f", 1), 1),
    ],
)
def test_the_checked_value_is_returned(checked, expected):
    found = checked()
    assert found == expected and type(found) is type(expected)


def test_a_generator_is_a_seed():
    generator = keras.random.SeedGenerator(0)
    assert validation.require_seed("f", generator, may_be_generator=True) is generator


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: validation.require_flag("f", "x", 1), "f expects True or False as `x`. Received: x=1."),
        (lambda: validation.require_count("f", "x", 0), "f expects a positive integer as `x`. Received: x=0."),
        (
            lambda: validation.require_count("f", "x", True, 2, may_be_none=True),
            "f expects an integer of 2 or more, or None, as `x`. Received: x=True.",
        ),
        (lambda: validation.require_seed("f", -1), "f expects an integer of 0 or more as `seed`. Received: seed=-1."),
        (
            lambda: validation.require_seed("f", 0.5, may_be_none=True, may_be_generator=True),
            "f expects an integer of 0 or more, a keras.random.SeedGenerator, or None, as `seed`. Received: seed=0.5.",
        ),
        (lambda: validation.require_number("f", "x", "1"), "f expects a finite number as `x`. Received: x='1'."),
        (lambda: validation.require_number("f", "x", np.inf), "f expects a finite number as `x`. Received: x=inf."),
        (lambda: validation.require_number("f", "x", 0, above=0), "f expects a positive number as `x`. Received: x=0."),
        (lambda: validation.require_number("f", "x", 1.0, above=1), "a number above 1 as `x`. Received: x=1.0."),
        (lambda: validation.require_number("f", "x", np.nan, least=0), "a number of 0 or more as `x`. Received: x=nan"),
        (
            lambda: validation.require_number("f", "x", 1, above=0, below=1, may_be_none=True),
            "f expects a number between 0 and 1, or None, as `x`. Received: x=1.",
        ),
        (lambda: validation.require_choice("f", "x", "c", ("a", "b", 2)), "f expects 'a', 'b' or 2 as `x`. Received"),
        (lambda: validation.require_choice("f", "x", np.ones(2), ("a", "b")), "Received: x=a ndarray of dtype float64"),
        (lambda: validation.require_verbose("f", True), "f expects 'auto', 0 or 1 as `verbose`. Received"),
    ],
)
def test_messages(check, message):
    with pytest.raises(ValueError) as error:
        check()
    assert message in str(error.value)


def test_advice_follows_what_was_received():
    error = validation.refused("f", "a path", "x", 3, "Give a string.")
    assert str(error) == "f expects a path as `x`. Received: x=3. Give a string."
