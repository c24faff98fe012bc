"""The first Lanczos steps and samples of the trace, computed in tensors.

In one program they take a fraction of the time of as many separate products: everything that does not depend on the
vector is computed once, and on small models the overhead of a call is longer than its computation.
"""

from typing import Any, NamedTuple

from keras import ops


class SpectrumStart(NamedTuple):
    """The first steps of the Lanczos method with a Hessian H.

    Attributes:
        rows: The orthonormal vectors q_j, of shape `(steps + 1, n)`.
        diagonal: q_j' H q_j for each step.
        remainders: For each step, the norm of the component of H q_j that is orthogonal to the vectors up to q_j.
        samples: v_i' H v_i, where v_i is a vector of random signs, orthogonalized against all rows but the last.
        gradient_norm: The norm of the gradient.
    """

    rows: Any
    diagonal: Any
    remainders: Any
    samples: Any
    gradient_norm: Any


def spectrum_start(hessian, gradient, first, bits, share, steps):
    """A `SpectrumStart` in tensors.

    Args:
        hessian: An object with `product(v)`, which returns H v for a flat vector v, and `quadratic_form(v)`, which
            returns v' H v.
        gradient: The gradient, a flat vector.
        first: The starting vector, of length n.
        bits: Zeros and ones of shape `(1 + samples, n)`. The first row has the signs of a random vector that is added
            to `first`, the others have those of the samples.
        share: The length of the vector that is added.
        steps: Number of Lanczos steps.
    """
    signs = 2 * ops.cast(bits, first.dtype) - 1
    w = first + (share / _norm(signs[0])) * signs[0]
    rows = ops.reshape(w / _norm(w), (1, -1))
    diagonal, remainders = [], []
    for j in range(steps):
        w = hessian.product(rows[j])
        # One Gram-Schmidt pass. If that is not enough, the remainder is so short that the caller does not use it.
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
