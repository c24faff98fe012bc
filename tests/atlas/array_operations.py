"""Inputs for the operations on arrays: elementwise, reductions, shapes, products."""

import numpy as np
from keras import ops

from tests.atlas.cases import words
from tests.atlas.inputs import bind, inside, many, normal, positive

_ids = np.array([0, 0, 1, 2], "int32")
# Drawn first, so that all others are what they were when the results were made.
IMAGE = normal(1, 5, 5, 2)
_key = np.array([1, 0], "int32")
_mask = np.array([True, False, True])


def _unary(fun, *arrays):
    return [(fun, (x,)) for x in arrays]


_x, _p, _i = normal(2, 3), positive(2, 3), inside(2, 3)

ELEMENTWISE = {
    **{
        name: _unary(getattr(ops, name), _x)
        for name in words(
            "abs absolute arcsinh arctan cbrt ceil celu conj conjugate copy cos cosh deg2rad elu erf erfc "
            "exp exp2 expm1 fabs floor gelu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh i0 imag "
            "leaky_relu log_sigmoid nan_to_num negative rad2deg real relu relu6 round selu sigmoid sign silu sin sinc "
            "sinh soft_shrink softplus softsign sparse_plus sparse_sigmoid square squareplus swish tan tanh "
            "tanh_shrink trunc angle"
        )
    },
    **{name: _unary(getattr(ops, name), _p) for name in words("log log10 log1p log2 reciprocal rsqrt sqrt")},
    **{name: _unary(getattr(ops, name), _i) for name in words("arccos arcsin arctanh erfinv")},
    "arccosh": _unary(ops.arccosh, 1 + _p),
    "clip": _unary(bind(ops.clip, -0.5, 0.7), _x),
    "threshold": _unary(bind(ops.threshold, 0.3, 0.1), _x),
    "cast": _unary(lambda x: ops.cast(x, x.dtype) * ops.cast(ops.cast(x, "float64"), x.dtype), _x),
    "saturate_cast": _unary(lambda x: ops.saturate_cast(x, "float64") * x, _x),
    "stop_gradient": _unary(lambda x: x * ops.stop_gradient(x) - ops.stop_gradient(x * 1.0) * x, _x),
    "convert_to_tensor": _unary(lambda x: ops.convert_to_tensor(x) * 2.0, _x),
    "array": _unary(lambda x: ops.array(x) * 2.0, _x),
    "full_like": _unary(lambda x: x * ops.full_like(x, 3.0), _x),
    "ones_like": _unary(lambda x: x * ops.ones_like(x), _x),
    "zeros_like": _unary(lambda x: x + ops.zeros_like(x), _x),
}

BINARY = {
    **{
        name: [(getattr(ops, name), (normal(2, 3), normal(2, 3))), (getattr(ops, name), (normal(3), normal(2, 1)))]
        for name in words("add arctan2 fmax fmin hypot logaddexp logaddexp2 maximum minimum multiply subtract")
    },
    **{
        name: [(getattr(ops, name), (normal(2, 3), positive(2, 3)))]
        for name in words("divide divide_no_nan floor_divide fmod mod true_divide")
    },
    "power": [
        (ops.power, (positive(2, 3), normal(2, 3))),
        (lambda x: x**3, (normal(3),)),
        (lambda x: x**2, (normal(3),)),
    ],
    "heaviside": [(ops.heaviside, (normal(2, 3), normal(2, 3)))],
    "ldexp": [(lambda x: ops.ldexp(x, np.array([1, 2, -1], "int32")), (normal(2, 3),))],
    "nextafter": [(lambda x: ops.nextafter(x, 0.0), (normal(3),))],
    "polar": [(lambda a, b: ops.real(ops.polar(a, b)), (positive(3), normal(3)))],
    "where": [
        (lambda a, b: ops.where(a > 0.1, a * b, b), (normal(2, 3), normal(2, 3))),
        (lambda a, b: ops.where(_mask, a, b), (normal(3), normal(3))),
    ],
    "select": [(lambda a, b: ops.select([_mask, ~_mask], [a, b], 0.0), (normal(3), normal(3)))],
    "cond": [(lambda a: ops.cond(ops.sum(a) > -100.0, lambda: ops.sin(a), lambda: a), (normal(3),))],
    "switch": [(lambda a: ops.switch(1, [ops.cos, ops.sin], a), (normal(3),))],
}

REDUCTIONS = {
    **{
        name: [
            (getattr(ops, name), (normal(2, 3),)),
            (bind(getattr(ops, name), axis=-1), (normal(2, 3),)),
        ]
        for name in words(
            "amax amin max min mean median nanmax nanmean nanmedian nanmin nanprod nanstd nansum nanvar prod ptp std "
            "sum var logsumexp average norm"
        )
    },
    **{
        name: [(bind(getattr(ops, name), axis=-1), (normal(2, 3),))]
        for name in words("cumprod cumsum nancumprod nancumsum log_softmax softmax sparsemax sort")
    },
    "norm of order 1": [
        (bind(ops.norm, 1, axis=-1), (normal(2, 3),)),
        (bind(ops.norm, np.inf, axis=-1), (normal(2, 3),)),
    ],
    "norm of a matrix": [
        (bind(ops.norm, "fro", axis=(-2, -1)), (normal(2, 3),)),
        (bind(ops.norm, "nuc", axis=(-2, -1)), (normal(2, 3),)),
        (bind(ops.norm, 2, axis=(-2, -1)), (normal(2, 3),)),
    ],
    "quantile": [(bind(ops.quantile, 0.3, axis=-1), (normal(2, 4),)), (bind(ops.quantile, [0.1, 0.9]), (normal(5),))],
    "percentile": [(bind(ops.percentile, 30.0, axis=-1), (normal(2, 4),))],
    "nanquantile": [(bind(ops.nanquantile, 0.3, axis=-1), (normal(2, 4),))],
    "nanpercentile": [(bind(ops.nanpercentile, 30.0, axis=-1), (normal(2, 4),))],
    "moments": [(bind(ops.moments, axes=(0,)), (normal(3, 2),))],
    "normalize": [(ops.normalize, (normal(2, 3),)), (bind(ops.normalize, order=3), (normal(2, 3),))],
    "top_k": [(lambda x: ops.top_k(x, 2)[0], (normal(2, 4),))],
    "segment_max": [(lambda x: ops.segment_max(x, _ids, 3), (normal(4, 2),))],
    "segment_min": [(lambda x: ops.segment_min(x, _ids, 3), (normal(4, 2),))],
    "segment_prod": [(lambda x: ops.segment_prod(x, _ids, 3), (normal(4, 2),))],
    "segment_sum": [(lambda x: ops.segment_sum(x, _ids, 3), (normal(4, 2),))],
    "bincount": [(lambda x: ops.bincount(_ids, weights=x), (normal(4),))],
    "trapezoid": [(lambda y, x: ops.trapezoid(y, x), (normal(4), np.sort(normal(4)))), (ops.trapezoid, (normal(4),))],
    "corrcoef": [(ops.corrcoef, (normal(2, 4),))],
    "glu": [(ops.glu, (normal(2, 4),))],
    "diff": [(ops.diff, (normal(2, 4),)), (bind(ops.diff, n=2), (normal(2, 4),))],
    "associative_scan": [(lambda x: ops.associative_scan(ops.multiply, x), (normal(4),))],
    "unique": [(lambda x: ops.unique(x), (normal(4),))],
}

SHAPES = {
    "append": [(ops.append, (normal(2), normal(3)))],
    "array_split": [(bind(ops.array_split, 2), (normal(3),))],
    "broadcast_to": [(bind(ops.broadcast_to, (2, 3)), (normal(3),))],
    "concatenate": [many(ops.concatenate, normal(2, 2), normal(1, 2))],
    "diag": [(ops.diag, (normal(3),)), (ops.diag, (normal(3, 3),))],
    "diagflat": [(ops.diagflat, (normal(3),))],
    "diagonal": [(ops.diagonal, (normal(3, 3),))],
    "depth_to_space": [(bind(ops.depth_to_space, 2), (normal(1, 2, 1, 4),))],
    "space_to_depth": [(bind(ops.space_to_depth, 2), (normal(1, 2, 2, 1),))],
    "dsplit": [(bind(ops.dsplit, 2), (normal(1, 2, 2),))],
    "hsplit": [(bind(ops.hsplit, 2), (normal(2, 2),))],
    "vsplit": [(bind(ops.vsplit, 2), (normal(2, 2),))],
    "dstack": [many(ops.dstack, normal(2, 2), normal(2, 2))],
    "hstack": [many(ops.hstack, normal(2, 2), normal(2, 2))],
    "vstack": [many(ops.vstack, normal(2, 2), normal(2, 2))],
    "stack": [many(ops.stack, normal(2), normal(2))],
    "unstack": [(ops.unstack, (normal(2, 2),))],
    "expand_dims": [(bind(ops.expand_dims, 1), (normal(3),))],
    "squeeze": [(ops.squeeze, (normal(1, 3),))],
    "extract_sequences": [(bind(ops.extract_sequences, 3, 2), (normal(7),))],
    "flip": [(ops.flip, (normal(2, 3),))],
    "fliplr": [(ops.fliplr, (normal(2, 3),))],
    "flipud": [(ops.flipud, (normal(2, 3),))],
    "rot90": [(ops.rot90, (normal(2, 3),))],
    "roll": [(bind(ops.roll, 1, axis=0), (normal(3, 2),))],
    "get_item": [(lambda x: ops.get_item(x, (slice(None), 1)), (normal(2, 3),)), (lambda x: x[::2], (normal(3),))],
    "meshgrid": [(lambda a, b: ops.meshgrid(a, b), (normal(2), normal(3)))],
    "moveaxis": [(bind(ops.moveaxis, 0, 1), (normal(2, 3),))],
    "swapaxes": [(bind(ops.swapaxes, 0, 1), (normal(2, 3),))],
    "transpose": [(ops.transpose, (normal(2, 3),))],
    "pad": [
        (bind(ops.pad, ((1, 1),)), (normal(4),)),
        (bind(ops.pad, ((1, 1),), mode="reflect"), (normal(4),)),
        (bind(ops.pad, ((1, 1),), mode="symmetric"), (normal(4),)),
    ],
    "ravel": [(ops.ravel, (normal(2, 3),))],
    "rearrange": [(bind(ops.rearrange, "a b -> b a"), (normal(2, 3),))],
    "repeat": [(bind(ops.repeat, 2, axis=0), (normal(2, 2),))],
    "reshape": [(bind(ops.reshape, (-1, 2)), (normal(2, 3),))],
    "tile": [(bind(ops.tile, 2), (normal(3),))],
    "slice": [(bind(ops.slice, [1], [2]), (normal(4),))],
    "slice_update": [(lambda x, u: ops.slice_update(x, [1], u), (normal(4), normal(2)))],
    "scatter": [(lambda u: ops.scatter([[0], [2], [0]], u, (4,)), (normal(3),))],
    "scatter_update": [
        (lambda x, u: ops.scatter_update(x, [[0], [2]], u), (normal(4), normal(2))),
        (lambda x, u: ops.scatter_update(x, [[0], [2]], u, reduction="add"), (normal(4), normal(2))),
        (lambda x, u: ops.scatter_update(x, [[0], [2]], u, reduction="mul"), (normal(4), normal(2))),
        (lambda x, u: ops.scatter_update(x, [[0], [2]], u, reduction="max"), (normal(4), normal(2))),
        (lambda x, u: ops.scatter_update(x, [[0], [2]], u, reduction="min"), (normal(4), normal(2))),
    ],
    "split": [(bind(ops.split, 2), (normal(4),))],
    "take": [(bind(ops.take, [0, 2, 0], axis=0), (normal(3, 2),))],
    "take_along_axis": [(lambda x: ops.take_along_axis(x, _key[:, None], 1), (normal(2, 3),))],
    "trace": [(ops.trace, (normal(3, 3),))],
    "tril": [(ops.tril, (normal(3, 3),))],
    "triu": [(ops.triu, (normal(3, 3),))],
    "vander": [(ops.vander, (normal(3),))],
    "view_as_complex": [(lambda x: ops.real(ops.view_as_complex(x) * ops.view_as_complex(x)), (normal(3, 2),))],
    "view_as_real": [(lambda x: ops.view_as_real(ops.view_as_complex(x) * ops.view_as_complex(x)), (normal(3, 2),))],
    "linspace": [(lambda a, b: ops.linspace(a, b, 4), (normal(2), normal(2)))],
    "logspace": [(lambda a, b: ops.logspace(a, b, 3), (normal(2), normal(2)))],
    "geomspace": [(lambda a, b: ops.geomspace(a, b, 3), (positive(2), positive(2)))],
    "full": [(lambda a: ops.full((3,), a), (normal(),))],
    "map": [(lambda x: ops.map(ops.sin, x), (normal(3, 2),))],
    "vectorized_map": [(lambda x: ops.vectorized_map(ops.sin, x), (normal(3, 2),))],
    "vectorize": [(lambda x: ops.vectorize(ops.sin)(x), (normal(3),))],
    "scan": [(lambda x: ops.scan(lambda c, y: (c * y, c + y), x[0], x)[1], (normal(3),))],
    "fori_loop": [(lambda x: ops.fori_loop(0, 3, lambda i, c: ops.sin(c) * x, x), (normal(2),))],
    "while_loop": [
        (lambda x: ops.while_loop(lambda i, c: i < 3, lambda i, c: (i + 1, ops.sin(c)), (0, x))[1], (normal(2),))
    ],
}

PRODUCTS = {
    "cdist": [(ops.cdist, (normal(2, 3), normal(3, 3)))],
    "correlate": [
        (ops.correlate, (normal(4), normal(2))),
        (bind(lambda x: ops.correlate(x, x, mode="same")), (normal(3),)),
    ],
    "cross": [(ops.cross, (normal(2, 3), normal(2, 3)))],
    "dot": [(ops.dot, (normal(2, 3), normal(3, 2)))],
    "einsum": [(lambda a, b: ops.einsum("ij,jk->ik", a, b), (normal(2, 3), normal(3, 2)))],
    "inner": [(ops.inner, (normal(2, 3), normal(2, 3)))],
    "kron": [(ops.kron, (normal(2, 2), normal(1, 2)))],
    "matmul": [(ops.matmul, (normal(2, 3), normal(3, 2))), (ops.matmul, (normal(3), normal(3)))],
    "outer": [(ops.outer, (normal(2), normal(3)))],
    "tensordot": [(lambda x: ops.tensordot(x, x, axes=[[0], [0]]), (normal(2, 3),))],
    "vdot": [(ops.vdot, (normal(3), normal(3)))],
}
