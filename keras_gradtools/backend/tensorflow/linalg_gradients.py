"""Gradients of matrix decompositions."""

import tensorflow as tf


def svd(original):
    """The vjp of the parts of a real matrix (Townsend, "Differentiating the singular value decomposition")."""

    def gradient(op, by_s, by_u, by_v):
        a = op.inputs[0]
        # The gradient of singular values alone takes the vectors from another `Svd`, whose gradient is this one.
        if not op.get_attr("compute_uv") or a.dtype.is_complex or a.shape.rank is None:
            return original(op, by_s, by_u, by_v)
        s, u, v = op.outputs
        rows, columns = a.shape[-2:]
        if None in (rows, columns) or op.get_attr("full_matrices") and rows != columns:
            return original(op, by_s, by_u, by_v)
        squares = tf.square(s)
        gaps = tf.linalg.set_diag(squares[..., None, :] - squares[..., None], tf.ones_like(s))
        turned_u, turned_v = (tf.linalg.matmul(x, by_x, transpose_a=True) for x, by_x in ((u, by_u), (v, by_v)))
        inner = tf.linalg.diag(by_s)
        inner += _quotient(turned_u - tf.linalg.matrix_transpose(turned_u), gaps) * s[..., None, :]
        inner += _quotient(turned_v - tf.linalg.matrix_transpose(turned_v), gaps) * s[..., None]
        found = u @ inner @ tf.linalg.matrix_transpose(v)
        # What the vectors of a matrix that is not square have outside of its range.
        if rows > columns:
            found += _quotient(by_u - u @ turned_u, s[..., None, :]) @ tf.linalg.matrix_transpose(v)
        elif columns > rows:
            found += u @ tf.linalg.matrix_transpose(_quotient(by_v - v @ turned_v, s[..., None, :]))
        return found

    return gradient


@tf.custom_gradient
def _quotient(a, b):
    """`a / b`, but 0 / 0 is 0: vectors of equal singular values that nothing depends on. So are its derivatives."""
    y = tf.where(tf.equal(a, 0), tf.zeros_like(a), a / b)

    def gradient(upstream):
        by_a = _quotient(upstream, b)
        by_b = -by_a * y
        axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(a), s1=tf.shape(b))[1]
        return by_a, tf.reshape(tf.reduce_sum(by_b, axes), tf.shape(b))

    return y, gradient


def lu(op, upstream, _):
    """With P A = L U: dL = L low(F) and dU = up(F) U, where F = inv(L) P dA inv(U)."""
    factors, permutation = op.outputs
    lower = tf.linalg.set_diag(tf.linalg.band_part(factors, -1, 0), tf.ones_like(tf.linalg.diag_part(factors)))
    upper = tf.linalg.band_part(factors, 0, -1)
    by_lower = upstream - tf.linalg.band_part(upstream, 0, -1)
    by_upper = tf.linalg.band_part(upstream, 0, -1)
    inner = tf.linalg.matmul(lower, by_lower, adjoint_a=True)
    inner = inner - tf.linalg.band_part(inner, 0, -1)
    inner += tf.linalg.band_part(tf.linalg.matmul(by_upper, upper, adjoint_b=True), 0, -1)
    inner = tf.linalg.triangular_solve(lower, inner, lower=True, adjoint=True)
    # X inv(U)' is the adjoint of inv(U) X'.
    inner = tf.linalg.adjoint(tf.linalg.triangular_solve(upper, tf.linalg.adjoint(inner), lower=False))
    # Row i of P A is row `permutation[i]` of A.
    back = tf.argsort(permutation, axis=-1)
    return tf.gather(inner, back, axis=-2, batch_dims=permutation.shape.rank - 1)
