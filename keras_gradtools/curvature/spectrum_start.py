"""What watching a spectrum begins with: a few steps of Lanczos' method, and samples of the trace, in tensors.

As one program they take a fraction of the time of as many products, each called by itself: what does not depend on the
vector is computed once, and on small models a call takes longer than what it computes.
"""

from typing import Any, NamedTuple

from keras import ops


class SpectrumStart(NamedTuple):
    """The first steps of Lanczos' method with a Hessian H.

    Attributes:
        rows: the orthonormal vectors q_j, one more than there are steps, of shape `(steps + 1, n)`.
        diagonal: q_j' H q_j for each step.
        remainders: for each step, the length of what the vectors up to q_j leave of H q_j.
        samples: v_i' H v_i, with v_i what the vectors but for the last one leave of a vector of signs.
        gradient_norm: the length of the gradient.
    """

    rows: Any
    diagonal: Any
    remainders: Any
    samples: Any
    gradient_norm: Any


def spectrum_start(hessian, gradient, first, bits, share, steps):
    """A `SpectrumStart` in tensors.

    Args:
        hessian: what maps a flat vector v by `product` to H v, and by `quadratic_form` to v' H v.
        gradient: a flat vector.
        first: what to begin with, of length n.
        bits: of 0 and 1, of shape `(1 + samples, n)`: the signs of what is added to `first`, and those of the samples.
        share: the length of what is added.
        steps: how many.
    """
    signs = 2 * ops.cast(bits, first.dtype) - 1
    w = first + (share / _norm(signs[0])) * signs[0]
    rows = ops.reshape(w / _norm(w), (1, -1))
    diagonal, remainders = [], []
    for j in range(steps):
        w = hessian.product(rows[j])
        # Once: where that is not enough, the remainder is so short that it is not made use of.
        parts = ops.matmul(rows, w)
        w = w - ops.matmul(parts, rows)
        diagonal.append(parts[j])
        remainders.append(_norm(w))
        length = ops.where(remainders[j] > 0, remainders[j], ops.ones_like(remainders[j]))
        rows = ops.concatenate([rows, ops.reshape(w / length, (1, -1))])
    known, vectors = rows[:steps], signs[1:]
    vectors = vectors - ops.matmul(ops.matmul(vectors, ops.transpose(known)), known)
    samples = [hessian.quadratic_form(vectors[i]) for i in range(bits.shape[0] - 1)]
    sampled = ops.stack(samples) if samples else ops.zeros((0,), first.dtype)
    return SpectrumStart(rows, ops.stack(diagonal), ops.stack(remainders), sampled, _norm(gradient))


def _norm(x):
    return ops.sqrt(ops.sum(x * x))
