"""The line search on functions of one variable."""

import math

import numpy as np
import pytest

from keras_gradtools.second_order.line_search import CURVATURE, DECREASE, Point, line_search

EPSILON = 2.0**-52
# More and Thuente's (1994) functions 1 to 3 and a quartic, with their derivatives.
FUNCTIONS = {
    "rational": (lambda a: -a / (a * a + 2.0), lambda a: (a * a - 2.0) / (a * a + 2.0) ** 2),
    "steep": (
        lambda a: (a + 0.004) ** 5 - 2.0 * (a + 0.004) ** 4,
        lambda a: 5.0 * (a + 0.004) ** 4 - 8.0 * (a + 0.004) ** 3,
    ),
    "quartic": (lambda a: (a - 3.0) ** 4, lambda a: 4.0 * (a - 3.0) ** 3),
    "exponential": (lambda a: math.exp(a) - 20.0 * a, lambda a: math.exp(a) - 20.0),
}


def search(name, step, most=40):
    fun, slope = FUNCTIONS[name]
    start = Point(0.0, fun(0.0), slope(0.0))
    return line_search(lambda t: Point(t, fun(t), slope(t)), start, step, most, EPSILON), start


@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_strong_wolfe_conditions_hold(name, step):
    found, start = search(name, step)
    assert found.is_wolfe and found.evaluations <= 20
    assert found.point.loss <= start.loss + DECREASE * found.point.step * start.slope
    assert abs(found.point.slope) <= CURVATURE * abs(start.slope)


def test_a_good_first_step_takes_one_evaluation():
    assert search("quartic", 2.0)[0].evaluations == 1


def test_a_quadratic_is_solved_by_its_cubic():
    # A first step that is too long encloses the minimum at 1, which the interpolation finds exactly.
    found = line_search(lambda t: Point(t, (t - 1.0) ** 2, 2.0 * (t - 1.0)), Point(0.0, 1.0, -2.0), 2.5, 5, EPSILON)
    assert found.evaluations == 2 and found.point.step == pytest.approx(1.0)


def test_steps_that_are_not_finite_are_shortened():
    def point(t):
        return Point(t, t * t - t, 2.0 * t - 1.0) if t < 1.0 else Point(t, math.nan, math.nan)

    found = line_search(point, Point(0.0, 0.0, -1.0), 64.0, 20, EPSILON)
    assert found.is_wolfe and 0.0 < found.point.step < 1.0


def test_no_decrease():
    found = line_search(lambda t: Point(t, 1.0 + t, 1.0), Point(0.0, 1.0, -1.0), 1.0, 7, EPSILON)
    assert found.point is None and found.evaluations == 7


def test_a_decrease_without_the_slope_is_taken_at_the_end():
    # The loss goes down with the same slope for ever.
    found = line_search(lambda t: Point(t, -t, -1.0), Point(0.0, 0.0, -1.0), 1.0, 4, EPSILON)
    assert not found.is_wolfe and found.point.loss < 0.0


def test_a_decrease_below_rounding_is_judged_by_the_slope():
    def point(t):
        return Point(t, float(np.float32(1.0 + 1e-12 * (t - 1.0) ** 2)), 2e-12 * (t - 1.0))

    found = line_search(point, point(0.0), 1.0, 5, 2.0**-23)
    assert found.is_wolfe and found.evaluations == 1
