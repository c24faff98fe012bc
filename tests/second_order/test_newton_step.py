"""Tests of one damped step on functions of one variable, whose losses are rounded."""

import numpy as np

from keras_gradtools.second_order.newton_equation import WeightSpace
from keras_gradtools.second_order.newton_program import Iterate
from keras_gradtools.second_order.newton_step import StepReason, newton_step
from keras_gradtools.second_order.step_solvers import DenseSolver, Proposal

# log cosh(x) is almost straight at x = 3, so that Newton's step from there leads a hundred too far.
HEIGHT, START = 1e-9, 3.0


class Valley:
    """1 + HEIGHT log cosh(START + offset): in single precision the loss is 1 everywhere near."""

    def loss(self, offset=None):
        return float(np.float32(1.0 + HEIGHT * np.log(np.cosh(self._x(offset)))))

    def loss_and_gradient(self, offset=None):
        return self.loss(offset), np.array([HEIGHT * np.tanh(self._x(offset))])

    def system(self):
        loss, gradient = self.loss_and_gradient()
        return loss, gradient, WeightSpace(np.array([[HEIGHT / np.cosh(START) ** 2]]), gradient)

    def _x(self, offset):
        return START if offset is None else START + float(offset[0])


class TestBelowRounding:
    def test_goes_on_with_more_damping(self):
        found = newton_step(Valley(), DenseSolver(Valley().system, "float32"), 1e-3 * HEIGHT)
        assert found.reason == StepReason.ACCEPTED and found.attempts > 3
        assert abs(START + found.step[0]) < START and found.damping > 1e-2 * HEIGHT

    def test_takes_a_shorter_step(self):
        class Solver:
            dtype = np.dtype("float32")

            def start(self, objective, damping, scale):
                return objective.loss_and_gradient()

            def solve(self, gradient, damping):
                def of(step):
                    curved = HEIGHT / np.cosh(START) ** 2 * step**2
                    return Iterate(lambda: np.array([step], "float32"), gradient[0] * step, curved)

                return Proposal([of(-100.0), of(-50.0), of(-2.0)], damping, 9, HEIGHT)

        found = newton_step(Valley(), Solver(), 1e-3 * HEIGHT)
        assert found.reason == StepReason.ACCEPTED and found.attempts == 1
        assert found.step[0] == -2.0 and found.damping == 2e-3 * HEIGHT

    def test_a_vanished_gradient_leaves_the_damping(self):
        class Flat(Valley):
            # Of the size of its rounding, whichever way one goes.
            def loss_and_gradient(self, offset=None):
                return 1.0, np.array([1e-12 if offset is None else 2e-12])

        def system():
            gradient = np.array([1e-12])
            return 1.0, gradient, WeightSpace(np.eye(1), gradient)

        found = newton_step(Flat(), DenseSolver(system, "float32"), 1e-3)
        assert found.reason == StepReason.VANISHED and found.step is None and found.damping == 1e-3
