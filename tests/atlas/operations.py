"""Inputs for every function of `keras.ops` that has a derivative, and the names of those that have none.

An entry is `name: [(fun, arrays), ...]`: a function of floating-point tensors, and the values of these. The awkward
inputs (zeros, ties, empty, one element) are made from the first of them in `cases.py`.
"""

import functools

import keras
import numpy as np
from keras import ops

_random = np.random.default_rng(7)


def words(text):
    return text.split()


def normal(*shape):
    return _random.normal(size=shape)


def positive(*shape):
    return 0.3 + _random.random(size=shape)


def inside(*shape):
    """Between -1 and 1, away from both and from 0."""
    x = _random.uniform(0.2, 0.8, size=shape)
    return x * _random.choice([-1.0, 1.0], size=shape)


def spd(n):
    x = normal(n, n)
    return x @ x.T + n * np.eye(n)


def symmetric(fun):
    """A function of one half of a matrix, given the mean of both."""
    return lambda x: fun((x + ops.swapaxes(x, -1, -2)) / 2)


def many(fun, *arrays):
    """A function of a list of tensors."""
    return (lambda *xs: fun(list(xs))), arrays


def bind(fun, *args, **kwargs):
    return lambda x: fun(x, *args, **kwargs)


_ids = np.array([0, 0, 1, 2], "int32")
_image = normal(1, 5, 5, 2)
_labels = np.array([[1, 2, 1]], "int32")
_key = np.array([1, 0], "int32")
_mask = np.array([True, False, True])
_channels_last = "channels_last"


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
    "custom_gradient": [],
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

LINEAR_ALGEBRA = {
    "cholesky": [(symmetric(ops.cholesky), (spd(3),)), (symmetric(bind(ops.cholesky, upper=True)), (spd(3),))],
    "cholesky_inverse": [(lambda x: ops.cholesky_inverse(ops.tril(x)), (np.linalg.cholesky(spd(3)),))],
    "det": [(ops.det, (spd(3),)), (ops.det, (np.diag([1.0, 2.0, 0.0]),))],
    "eigh": [(symmetric(ops.eigh), (spd(3),))],
    "inv": [(ops.inv, (spd(3),))],
    "logdet": [(ops.logdet, (spd(3),))],
    "lstsq": [(ops.lstsq, (normal(4, 2), normal(4)))],
    "lu_factor": [(lambda x: ops.lu_factor(x)[0], (spd(3),))],
    "pinv": [(ops.pinv, (normal(3, 2),))],
    "qr": [(ops.qr, (normal(3, 2),)), (ops.qr, (normal(2, 2),))],
    "slogdet": [(lambda x: ops.slogdet(x)[1], (spd(3),))],
    "solve": [(ops.solve, (spd(3), normal(3, 2)))],
    "solve_triangular": [(lambda a, b: ops.solve_triangular(ops.tril(a), b, lower=True), (spd(3), normal(3, 2)))],
    "svd": [
        (lambda x: ops.svd(x, full_matrices=False), (normal(3, 2),)),
        (bind(ops.svd, compute_uv=False), (normal(2, 3),)),
        (lambda x: ops.svd(x, full_matrices=False)[1], (np.eye(2),)),
    ],
}

FOURIER = {
    "fft": [(lambda a, b: ops.fft((a, b)), (normal(4), normal(4)))],
    "fft2": [(lambda a, b: ops.fft2((a, b)), (normal(2, 2), normal(2, 2)))],
    "ifft2": [(lambda a, b: ops.ifft2((a, b)), (normal(2, 2), normal(2, 2)))],
    "rfft": [(ops.rfft, (normal(4),)), (ops.rfft, (normal(5),))],
    "irfft": [(lambda a, b: ops.irfft((a, b)), (normal(3), normal(3)))],
    "stft": [(bind(ops.stft, 4, 2, 4), (normal(8),))],
    "istft": [(lambda a, b: ops.istft((a, b), 4, 2, 4), (normal(5, 3), normal(5, 3)))],
}

NEURAL = {
    "adaptive_average_pool": [(bind(ops.adaptive_average_pool, 2, data_format=_channels_last), (normal(1, 5, 2),))],
    "adaptive_max_pool": [(bind(ops.adaptive_max_pool, 2, data_format=_channels_last), (normal(1, 5, 2),))],
    "average_pool": [
        (bind(ops.average_pool, 2, data_format=_channels_last), (normal(1, 4, 2),)),
        (bind(ops.average_pool, 3, 2, "same", data_format=_channels_last), (normal(1, 4, 4, 1),)),
    ],
    "max_pool": [
        (bind(ops.max_pool, 2, data_format=_channels_last), (normal(1, 4, 2),)),
        (bind(ops.max_pool, 3, 2, "same", data_format=_channels_last), (normal(1, 4, 4, 1),)),
    ],
    "batch_normalization": [
        (
            lambda x, m, v, o, s: ops.batch_normalization(x, m, v, -1, o, s),
            (normal(3, 2), normal(2), positive(2), normal(2), normal(2)),
        )
    ],
    "layer_normalization": [(ops.layer_normalization, (normal(2, 3), normal(3), normal(3)))],
    "rms_normalization": [(ops.rms_normalization, (normal(2, 3), normal(3)))],
    "binary_crossentropy": [
        (ops.binary_crossentropy, (positive(3) / 2, positive(3) / 2)),
        (lambda x: ops.binary_crossentropy(np.array([0.0, 1.0, 1.0]), x, from_logits=True), (normal(3),)),
    ],
    "categorical_crossentropy": [
        (ops.categorical_crossentropy, (positive(2, 3), positive(2, 3))),
        (lambda t, x: ops.categorical_crossentropy(t, x, from_logits=True), (positive(2, 3), normal(2, 3))),
    ],
    "sparse_categorical_crossentropy": [
        (lambda x: ops.sparse_categorical_crossentropy(_key, x), (positive(2, 3),)),
        (lambda x: ops.sparse_categorical_crossentropy(_key, x, from_logits=True), (normal(2, 3),)),
    ],
    "ctc_loss": [
        (lambda x: ops.ctc_loss(_labels, x, np.array([3], "int32"), np.array([5], "int32")), (normal(1, 5, 4),))
    ],
    "conv": [
        (lambda x, k: ops.conv(x, k, data_format=_channels_last), (normal(1, 4, 2), normal(2, 2, 2))),
        (lambda x, k: ops.conv(x, k, 2, "same", data_format=_channels_last), (normal(1, 4, 4, 1), normal(2, 2, 1, 2))),
    ],
    "conv_transpose": [
        (lambda x, k: ops.conv_transpose(x, k, 2, data_format=_channels_last), (normal(1, 3, 2), normal(2, 2, 2)))
    ],
    "depthwise_conv": [
        (lambda x, k: ops.depthwise_conv(x, k, data_format=_channels_last), (normal(1, 4, 2), normal(2, 2, 1)))
    ],
    "separable_conv": [
        (
            lambda x, d, p: ops.separable_conv(x, d, p, data_format=_channels_last),
            (normal(1, 4, 2), normal(2, 2, 1), normal(1, 2, 2)),
        )
    ],
    "dot_product_attention": [
        (ops.dot_product_attention, (normal(1, 3, 1, 2), normal(1, 3, 1, 2), normal(1, 3, 1, 2))),
        (
            lambda q, k, v: ops.dot_product_attention(q, k, v, is_causal=True),
            (normal(1, 3, 1, 2), normal(1, 3, 1, 2), normal(1, 3, 1, 2)),
        ),
    ],
    "fold": [(bind(ops.fold, (3, 3), 2), (normal(1, 4, 4),))],
    "unfold": [(bind(ops.unfold, 2), (normal(1, 1, 3, 3),))],
    "psnr": [(lambda a, b: ops.psnr(a, b, 1.0), (positive(2, 3), positive(2, 3)))],
    "gelu exact": [(bind(ops.gelu, approximate=False), (normal(2, 3),))],
}

_rgb = positive(1, 2, 2, 3)
# No coordinate is an integer, where an interpolation has a kink.
_affine = np.array([[1.13, 0.11, 0.23, -0.07, 0.91, 0.31, 0.013, 0.017]])


def _elastic_transform(x):
    keras.utils.set_random_seed(1)  # on torch, Keras does not draw by the seed that it is given
    return ops.image.elastic_transform(x, 2.0, 1.0, seed=1, **_last)


_corners = np.array([[[0.1, 0.2], [4.2, 0.1], [0.3, 4.1], [3.9, 4.3]]])
_corners_to = np.array([[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]]])
_last = {"data_format": _channels_last}

IMAGES = {
    "image.affine_transform": [
        (lambda x, t: ops.image.affine_transform(x, t, fill_mode="nearest", **_last), (_image[..., :1], _affine)),
        (lambda x: ops.image.affine_transform(x, _affine, fill_mode="constant", **_last), (_image[..., :1],)),
        (
            lambda x, t: ops.image.affine_transform(x, t, fill_mode="constant", fill_value=0.3, **_last),
            (_image[..., :1], _affine),
        ),
    ],
    "image.crop_images": [
        (
            lambda x: ops.image.crop_images(
                x, top_cropping=1, left_cropping=1, target_height=2, target_width=2, **_last
            ),
            (normal(1, 4, 4, 1),),
        )
    ],
    "image.elastic_transform": [(_elastic_transform, (_image[..., :1],))],
    "image.extract_patches": [(lambda x: ops.image.extract_patches(x, 2, **_last), (normal(1, 4, 4, 1),))],
    "image.extract_patches_3d": [(lambda x: ops.image.extract_patches_3d(x, 2, **_last), (normal(1, 2, 2, 2, 1),))],
    "image.gaussian_blur": [(lambda x: ops.image.gaussian_blur(x, (3, 3), (1.0, 1.0), **_last), (normal(1, 3, 3, 1),))],
    "image.hsv_to_rgb": [(lambda x: ops.image.hsv_to_rgb(x, **_last), (0.7 * _rgb,))],
    "image.rgb_to_hsv": [(lambda x: ops.image.rgb_to_hsv(x, **_last), (0.7 * _rgb,))],
    "image.rgb_to_grayscale": [(lambda x: ops.image.rgb_to_grayscale(x, **_last), (_rgb,))],
    "image.map_coordinates": [
        (lambda x, c: ops.image.map_coordinates(x, c, order=1), (normal(4, 4), 1.3 + positive(2, 3))),
        (lambda x: ops.image.map_coordinates(x, np.array([[0.3, 1.6], [1.2, 2.7]]), order=0), (normal(4, 4),)),
    ],
    "image.pad_images": [
        (lambda x: ops.image.pad_images(x, 1, 1, target_height=4, target_width=4, **_last), (normal(1, 2, 2, 1),))
    ],
    "image.perspective_transform": [
        (
            lambda x, p: ops.image.perspective_transform(x, p, _corners_to, fill_value=0.0, **_last),
            (_image[..., :1], _corners),
        )
    ],
    "image.resize": [
        (
            functools.partial(lambda x, mode: ops.image.resize(x, (4, 5), mode, **_last), mode=mode),
            (normal(1, 3, 3, 1),),
        )
        for mode in ("bilinear", "bicubic", "nearest", "lanczos3", "lanczos5")
    ]
    + [(lambda x: ops.image.resize(x, (2, 2), antialias=True, **_last), (normal(1, 5, 5, 1),))],
    "image.scale_and_translate": [
        (
            functools.partial(
                lambda x, s, t, method: ops.image.scale_and_translate(x, (1, 4, 4, 1), s, t, (1, 2), method),
                method=method,
            ),
            (normal(1, 3, 3, 1), np.array([1.3, 1.2]), np.array([0.1, 0.23])),
        )
        for method in ("linear", "cubic")
    ],
    "image.sobel_edges": [(lambda x: ops.image.sobel_edges(x, **_last), (normal(1, 3, 3, 1),))],
    "image.ssim": [
        (lambda a, b: ops.image.ssim(a, b, 1.0, filter_size=3, **_last), (positive(1, 4, 4, 1), positive(1, 4, 4, 1)))
    ],
}

OPERATIONS = {
    **ELEMENTWISE,
    **BINARY,
    **REDUCTIONS,
    **SHAPES,
    **PRODUCTS,
    **LINEAR_ALGEBRA,
    **FOURIER,
    **NEURAL,
    **IMAGES,
}

# What returns integers, booleans, strings or constants, creates tensors, or is a transform of its own.
WITHOUT_DERIVATIVE = set(
    words(
        "all allclose any arange argmax argmin argpartition argsort bartlett bitwise_and bitwise_invert "
        "bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman convert_to_numpy "
        "count_nonzero ctc_decode digitize dtype empty empty_like equal eye gcd greater greater_equal hamming hanning "
        "histogram identity in_top_k is_tensor isclose isfinite isin isinf isnan isneginf isposinf isreal kaiser lcm "
        "left_shift less less_equal logical_and logical_not logical_or logical_xor matrix_rank multi_hot nanargmax "
        "nanargmin ndim nonzero not_equal one_hot ones right_shift searchsorted shape signbit size tri unravel_index "
        "zeros jvp grad view eig custom_gradient"
    )
)


def names():
    """The public functions of `keras.ops`, those of `ops.image` with their prefix."""
    found = {name for name in dir(ops) if not name.startswith("_") and callable(getattr(ops, name))}
    images = {f"image.{name}" for name in dir(keras.ops.image) if not name.startswith("_")}
    return found | images
