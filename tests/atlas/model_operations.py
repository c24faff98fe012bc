"""Inputs for the operations of linear algebra, of Fourier transforms, of networks and on images."""

import functools

import keras
import numpy as np
from keras import ops

from tests.atlas.array_operations import IMAGE
from tests.atlas.inputs import bind, normal, positive, spd, symmetric

_labels = np.array([[1, 2, 1]], "int32")
_key = np.array([1, 0], "int32")
_channels_last = "channels_last"


LINEAR_ALGEBRA = {
    "cholesky": [(symmetric(ops.cholesky), (spd(3),)), (symmetric(bind(ops.cholesky, upper=True)), (spd(3),))],
    "cholesky_inverse": [(lambda x: ops.cholesky_inverse(ops.tril(x)), (np.linalg.cholesky(spd(3)),))],
    "det": [(ops.det, (spd(3),)), (ops.det, (np.diag([1.0, 2.0, 0.0]),))],
    "eigh": [(symmetric(ops.eigh), (spd(3),))],
    "inv": [(ops.inv, (spd(3),))],
    # TensorFlow reads the lower triangle alone.
    "logdet": [(symmetric(ops.logdet), (spd(3),))],
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
        (lambda x, t: ops.image.affine_transform(x, t, fill_mode="nearest", **_last), (IMAGE[..., :1], _affine)),
        (lambda x: ops.image.affine_transform(x, _affine, fill_mode="constant", **_last), (IMAGE[..., :1],)),
        (
            lambda x, t: ops.image.affine_transform(x, t, fill_mode="constant", fill_value=0.3, **_last),
            (IMAGE[..., :1], _affine),
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
    "image.elastic_transform": [(_elastic_transform, (IMAGE[..., :1],))],
    "image.extract_patches": [(lambda x: ops.image.extract_patches(x, 2, **_last), (normal(1, 4, 4, 1),))],
    "image.extract_patches_3d": [(lambda x: ops.image.extract_patches_3d(x, 2, **_last), (normal(1, 2, 2, 2, 1),))],
    "image.gaussian_blur": [(lambda x: ops.image.gaussian_blur(x, (3, 3), (1.0, 1.0), **_last), (normal(1, 3, 3, 1),))],
    "image.hsv_to_rgb": [(lambda x: ops.image.hsv_to_rgb(x, **_last), (0.7 * _rgb,))],
    "image.rgb_to_hsv": [
        (lambda x: ops.image.rgb_to_hsv(x, **_last), (0.7 * _rgb,)),
        (lambda x: ops.image.rgb_to_hsv(x, **_last), (_rgb - 0.4,)),
    ],
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
            (IMAGE[..., :1], _corners),
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
