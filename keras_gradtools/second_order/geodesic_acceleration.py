"""The second-order correction of a Levenberg-Marquardt step, from the second derivative of the model along it."""

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.data.batch_loss import with_masks_of
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.operators.linear_maps import SecondDerivative, filled, taped
from keras_gradtools.tape import vectors
from keras_gradtools.transforms.taped_call import TapedCall

_NAME = "geodesic acceleration"
# Transtrum & Sethna's alpha: a correction above this share of half the step means that the step is too long.
_LARGEST_SHARE = 0.75


class GeodesicAcceleration:
    r"""Turns a step $v$ into $v + \frac12 a$, with $(G + \lambda D) a = -\frac1N J^\top H u$.

    $u = \frac{d^2}{dt^2} f(\theta + t v)$ is the second derivative of the outputs along the step, $J$ their Jacobian,
    and $H$ the Hessian of the loss with respect to them. The step then follows a parabola instead of a line. It is used
    if $2 \|a\| \le 0.75 \|v\|$, in the units in which $D$ is the identity.

    Args:
        operator: A `GaussNewton` operator of one batch.

    Cost:
        About three gradients for each damping that is tried.

    Source: Transtrum & Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
    minimization" (2012), equations 13 to 15.
    """

    def __init__(self, operator):
        self._operator = operator

    def of(self, equation, step, damping):
        """The corrected step, or None if the correction is too large to be trusted."""
        (batch,) = self._operator.batches()
        parts = self._operator.compute(
            _NAME, _of_batch, batch, ops.convert_to_tensor(step.astype(self._operator.dtype))
        )
        outputs, pulled_back = ([ops.convert_to_numpy(part[i]).astype("float64") for part in parts] for i in range(2))
        (total,), count = backend.summed_over_processes([sum(pulled_back)], batch_size_of(batch))
        right = equation.right_side(np.concatenate(outputs), np.asarray(ops.convert_to_numpy(total)) / count)
        correction, _ = equation.solve(damping, right)
        # Written so that NaN is not trusted.
        if not 2.0 * equation.length(correction) <= _LARGEST_SHARE * equation.length(step):
            return None
        return step + 0.5 * correction


def _of_batch(spec, loss, parameters, model, batch, vector):
    """For each replica's part: the second derivative u of the outputs along the vector, and the sum of J' H u."""

    def of_part(part):
        x, y, sample_weight = part
        weights, tangents = parameters.variables_as_tensors(), parameters.split(vector)

        def outputs(weights):
            return spec.loss.outputs(model, weights, x)

        def along(weights):
            return TapedCall(_NAME, outputs, (weights,)).jvp(tangents)

        second = vectors.differentiable(TapedCall(_NAME, along, (weights,)).jvp(tangents))
        call = taped(_NAME, outputs, weights)

        def loss_of(outputs_):
            return spec.loss.of_outputs(with_masks_of(outputs_, call.target), y, sample_weight)

        curved = SecondDerivative(_NAME, loss_of, call.value).apply(second)
        found = backend.pullback(call.tape, call.flat_targets, call.flat_sources, curved)
        size = batch_size_of(part)
        flat = [ops.reshape(u, (u.shape[0], -1)) for u in second]
        return [ops.concatenate(flat, axis=-1), size * parameters.joined(filled(found, call.flat_sources))]

    parts = backend.replica_results(of_part, batch, parameters.variables[0])
    return [[ops.stop_gradient(x) for x in part] for part in parts], None
