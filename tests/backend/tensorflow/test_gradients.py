"""Gradients of single operations that TensorFlow gets wrong or lacks, against closed forms; the other backends, too."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import testing
from tests.cases import close, tensor

ON_TENSORFLOW = keras.config.backend() == "tensorflow"
only_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="an operation of TensorFlow's alone")
# The package mends these operations on TensorFlow. The other backends show that the expected values are right.
pytestmark = pytest.mark.fast_on("tensorflow")
RANDOM = np.random.default_rng(0)
TRANSFORM = (0.9, 0.1, 0.3, -0.2, 1.1, 0.2, 0.0, 0.0)


def products_without(x, *left_out):
    return np.prod(np.delete(x, left_out))


@pytest.mark.parametrize("x", [(2.0, 0.0, 3.0), (0.0, 0.0, 3.0), (0.0, 0.0, 0.0), (1.5, -2.0, 0.5), (2.0,)])
class TestProducts:
    """TensorFlow divides by the factors: the gradient of `cumprod` at (2, 0, 3) is (1, 2, 0) to it, for (1, 8, 0)."""

    def test_first_derivative_of_cumprod(self, x):
        jacobian = [[products_without(x[: k + 1], i) if i <= k else 0 for i in range(len(x))] for k in range(len(x))]
        close(kg.jacobian(ops.cumprod)(tensor(x)), jacobian)
        close(kg.grad(lambda x: ops.sum(ops.cumprod(x)))(tensor(x)), np.sum(jacobian, axis=0))
        close(kg.jit(kg.grad(lambda x: ops.sum(ops.cumprod(x))))(tensor(x)), np.sum(jacobian, axis=0))

    def test_second_derivative_of_prod(self, x):
        n = len(x)
        hessian = [[0 if i == j else products_without(x, i, j) for i in range(n)] for j in range(n)]
        close(kg.hessian(ops.prod)(tensor(x)), hessian)
        close(kg.hvp(ops.prod, (tensor(x),), (ops.ones(n),))[0], np.sum(hessian, axis=0))

    def test_third_derivative_of_prod(self, x):
        n = len(x)
        third = np.zeros((n, n, n))
        for i, j, k in itertools.permutations(range(n), 3):
            third[i, j, k] = products_without(x, i, j, k)
        close(kg.jacobian(kg.hessian(ops.prod))(tensor(x)), third)


@only_tensorflow
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("exclusive", "reverse"), [(False, True), (True, False), (True, True), (False, False)])
def test_cumulative_products_along_any_axis(exclusive, reverse, known):
    import tensorflow as tf

    x = RANDOM.normal(size=(3, 4)).astype("float32")
    x[1, 2] = x[2, 0] = 0.0
    signature = [tf.TensorSpec([3, 4] if known else [None, None])]
    for axis in (0, 1, -1):

        @tf.function(input_signature=signature)
        def gradient(x, axis=axis):
            return kg.grad(lambda x: tf.reduce_sum(tf.math.cumprod(x, axis, exclusive, reverse) ** 2))(x)

        def by_hand(x, axis=axis):
            factors = list(np.moveaxis(x, axis, 0)[:: -1 if reverse else 1])
            shifted = [np.ones_like(factors[0]), *factors[:-1]] if exclusive else factors
            return np.sum(np.cumprod(shifted, axis=0) ** 2)

        step = 1e-6 * np.eye(12).reshape(12, 3, 4)
        slopes = [(by_hand(x.astype("float64") + h) - by_hand(x.astype("float64") - h)) / 2e-6 for h in step]
        close(gradient(tensor(x)), np.reshape(slopes, (3, 4)), atol=1e-5)


IDS = np.array([2, 0, 2, -1, 0, 2, 3])
needs_segment_prod = pytest.mark.skipif(not hasattr(ops, "segment_prod"), reason="this Keras has no segment_prod")


def hessian_of_segments(x, ids):
    """The Hessian of the sum of all products of segments. Entries with a negative index are in none."""
    n = len(x)
    hessian = np.zeros((n, n))
    for i, j in itertools.permutations(range(n), 2):
        if ids[i] == ids[j] >= 0:
            hessian[i, j] = np.prod([x[k] for k in range(n) if ids[k] == ids[i] and k not in (i, j)])
    return hessian


@only_tensorflow
@needs_segment_prod
@pytest.mark.parametrize(
    ("x", "ids"),
    [
        ((1.5, -2.0, 0.5, 7.0, 3.0, 2.0, 4.0), IDS),
        ((0.0, -2.0, 0.0, 7.0, 0.0, 2.0, 0.0), IDS),
        ((0.0,) * 7, IDS),
        ((0.0, -2.0, 0.0, 7.0, 0.0, 2.0, 0.0), np.sort(np.abs(IDS))),
    ],
    ids=["any", "two zeros in a segment", "zeros", "two zeros in a sorted segment"],
)
def test_products_of_segments(x, ids):
    def total(x):
        return ops.sum(ops.segment_prod(x, ids, 4))

    x, expected = np.array(x), hessian_of_segments(np.array(x), ids)
    gradient = [np.prod(x[(ids == ids[i]) & (np.arange(7) != i)]) if ids[i] >= 0 else 0 for i in range(7)]
    close(kg.grad(total)(tensor(x)), gradient)
    close(kg.hessian(total)(tensor(x)), expected)
    close(kg.jit(kg.jacobian(kg.grad(total)))(tensor(x)), expected)
    v = np.random.default_rng(0).normal(size=7)
    close(kg.linearize(kg.grad(total), tensor(x))[1](tensor(v)), expected @ v)
    close(kg.hvp(total, (tensor(x),), (tensor(v),))[0], expected @ v)
    step = 1e-3 * v  # the Hessian is a polynomial of degree 1 for up to three factors
    third = (hessian_of_segments(x + step, ids) - hessian_of_segments(x - step, ids)) @ v / 2e-3
    close(kg.jvp(lambda x: kg.hvp(total, (x,), (tensor(v),))[0], (tensor(x),), (tensor(v),))[1], third, atol=1e-4)


@needs_segment_prod
@pytest.mark.skipif(ON_TENSORFLOW, reason="TensorFlow has all derivatives")
def test_missing_derivatives_of_products_of_segments_are_errors():
    """JAX has none, and torch no second one where a segment has two zeros."""
    with pytest.raises((NotImplementedError, RuntimeError), match="scatter"):
        kg.hessian(lambda x: ops.sum(ops.segment_prod(x, np.array([0, 0, 1]), 2)))(tensor([0.0, 0.0, 1.0]))


@only_tensorflow
def test_products_of_segments_of_rows_with_indices_of_two_axes():
    import tensorflow as tf

    x, ids = RANDOM.normal(size=(2, 3, 2)), np.array([[0, 2, 0], [-1, 0, 2]])
    x[0, 0, 0] = x[1, 1, 0] = 0.0

    def gradient(x):
        return kg.grad(lambda x: tf.reduce_sum(tf.math.unsorted_segment_prod(x, ids, 3)))(x)

    places = [(i, j, k) for i in range(2) for j in range(3) for k in range(2)]
    expected = np.zeros_like(x)
    for i, j, k in places:
        same = [x[a, b, k] for a in range(2) for b in range(3) if ids[a, b] == ids[i, j] and (a, b) != (i, j)]
        expected[i, j, k] = np.prod(same) if ids[i, j] >= 0 else 0
    close(gradient(tensor(x)), expected)
    unknown = tf.function(gradient, input_signature=[tf.TensorSpec([None, None, 2], tf.float32)])
    close(unknown(tensor(x)), expected)
    close(tf.function(gradient, jit_compile=True)(tensor(x)), expected)


class TestAffineTransform:
    """TensorFlow's gradient interpolates along the inverse transform, which is not the adjoint."""

    @pytest.mark.parametrize("fill_mode", ["constant", "nearest", "reflect", "wrap"])
    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
    def test_by_the_image(self, interpolation, fill_mode):
        """It is linear in the image: J x = f(x), and the Hessian of the sum of cubes is J' diag(6 f) J."""
        transform = tensor(TRANSFORM)
        images = RANDOM.normal(size=(1, 4, 5, 1))

        def transformed(images):
            return ops.image.affine_transform(images, transform, interpolation, fill_mode)

        f = ops.convert_to_numpy(transformed(tensor(images))).reshape(-1)
        jacobian = ops.convert_to_numpy(kg.jacobian(transformed)(tensor(images))).reshape(20, 20)
        close(jacobian @ images.reshape(-1), f, atol=1e-5)
        # That the gradient is differentiable does not depend on where it reads.
        if (interpolation, fill_mode) not in (("bilinear", "reflect"), ("nearest", "constant")):
            return
        hessian = kg.hessian(lambda x: ops.sum(transformed(x) ** 3))(tensor(images))
        close(ops.reshape(hessian, (20, 20)), jacobian.T @ np.diag(6 * f) @ jacobian, atol=1e-4)

    def test_by_the_transform(self):
        """Moving a ramp by t lowers it by t."""
        ramp = ops.reshape(ops.arange(6, dtype="float32"), (1, 1, 6, 1)) * ops.ones((1, 6, 1, 1))

        def center(t):
            shift = ops.concatenate([tensor([1.0, 0.0]), t[None], tensor([0.0, 1.0, 0.0, 0.0, 0.0])])
            return ops.image.affine_transform(ramp, shift, fill_mode="nearest")[0, 2, 2, 0]

        close(kg.value_and_grad(center)(tensor(0.25)), (2.25, 1.0))

    @only_tensorflow
    @pytest.mark.parametrize("compiler", [lambda fun: fun, kg.jit])
    def test_by_the_transform_with_a_fill_value_is_an_error(self, compiler):
        def total(transform):
            return ops.sum(ops.image.affine_transform(ops.ones((1, 3, 3, 1)), transform, fill_value=3.0))

        with pytest.raises(NotImplementedError, match="depends on `fill_value`.*fill_mode='nearest'"):
            compiler(kg.grad(total))(tensor(TRANSFORM))

    @only_tensorflow
    @pytest.mark.parametrize("fill_mode", ["CONSTANT", "NEAREST", "REFLECT", "WRAP"])
    @pytest.mark.parametrize("interpolation", ["NEAREST", "BILINEAR"])
    def test_interpolates_as_the_kernel_does(self, interpolation, fill_mode):
        import tensorflow as tf

        from keras_gradtools.backend.tensorflow.image_gradients import projected_images

        for size in ((4, 5), (1, 3), (7, 2)):
            images = tensor(RANDOM.normal(size=(2, *size, 3)))
            transforms = RANDOM.normal(size=(2, 8)) * [1, 1, 3, 1, 1, 3, 0.05, 0.05]
            # Halves, which round away from zero.
            exact = [[1, 0, shift, 0, 1, -shift, 0, 0] for shift in (-2.5, 0.5)]
            for of_images in (transforms, transforms[:1], exact):
                arguments = images, tensor(of_images), tf.constant([5, 4])
                kernel = tf.raw_ops.ImageProjectiveTransformV3(
                    images=images,
                    transforms=arguments[1],
                    output_shape=arguments[2],
                    fill_value=0.7,
                    interpolation=interpolation,
                    fill_mode=fill_mode,
                )
                close(projected_images(*arguments, 0.7, interpolation, fill_mode), kernel, atol=1e-4)


def test_slice_update():
    """Both the rest of the input and the update pass their gradient; TensorFlow alone raises `LookupError`."""
    x, update = tensor(RANDOM.normal(size=(3, 3))), tensor(RANDOM.normal(size=(2, 2)))

    def fun(x, update):
        return ops.sum(ops.slice_update(x, (1, 0), update) ** 3)

    by_x, by_update = kg.grad(fun, argnums=(0, 1))(x, update)
    rest = np.array([[1, 1, 1], [0, 0, 1], [0, 0, 1]])
    close(by_x, 3 * rest * np.asarray(x) ** 2)
    close(by_update, 3 * np.asarray(update) ** 2)
    second = kg.hvp(fun, (x, update), (ops.ones((3, 3)), ops.ones((2, 2))))
    close(second, (6 * rest * np.asarray(x), 6 * np.asarray(update)))


@pytest.mark.float64
def test_lu_factor():
    a = tensor(RANDOM.normal(size=(4, 4)), "float64")
    testing.check_gradients(lambda a: ops.lu_factor(a)[0], (a,), order=2)


@only_tensorflow
def test_resizing_by_lanczos_in_double_precision():
    """A constant image stays one: the gradient of the mean by the image sums to 1. TensorFlow has no kernel for it."""
    images = tensor(RANDOM.normal(size=(1, 4, 4, 1)), "float64")
    gradient = kg.grad(lambda x: ops.mean(ops.image.resize(x, (5, 3), interpolation="lanczos3")))(images)
    assert gradient.dtype == "float64"
    close(ops.sum(gradient), 1.0)


class TestCrossEntropy:
    """TensorFlow takes the sum of the labels for 1: the gradient by the logits is softmax - labels to it."""

    LABELS = np.array([[0.5, 2.0, 0.0], [0.2, 0.3, 0.5]])
    LOGITS = np.array([[0.3, -1.0, 0.4], [2.0, 0.1, -0.5]])

    def softmax(self):
        e = np.exp(self.LOGITS)
        return e / e.sum(-1, keepdims=True)

    @pytest.mark.parametrize("transform", [lambda fun: fun, kg.jit])
    def test_first_derivative(self, transform):
        gradient = transform(kg.grad(lambda t, z: ops.sum(self.loss(t, z)), argnums=(0, 1)))
        by_labels, by_logits = gradient(tensor(self.LABELS), tensor(self.LOGITS))
        close(by_labels, -np.log(self.softmax()))
        close(by_logits, self.LABELS.sum(-1, keepdims=True) * self.softmax() - self.LABELS)

    def test_second_derivative(self):
        (by_labels, mixed), (_, by_logits) = kg.hessian(self.loss, argnums=(0, 1))(
            tensor(self.LABELS[:1]), tensor(self.LOGITS[:1])
        )
        p, total = self.softmax()[0], self.LABELS[0].sum()
        close(ops.squeeze(by_labels), np.zeros((3, 3)))
        close(ops.squeeze(mixed), p[None] - np.eye(3))
        close(ops.squeeze(by_logits), total * (np.diag(p) - np.outer(p, p)))

    def loss(self, labels, logits):
        return ops.categorical_crossentropy(labels, logits, from_logits=True)

    @only_tensorflow
    def test_its_second_output(self):
        import tensorflow as tf

        def difference(z):
            return tf.raw_ops.SoftmaxCrossEntropyWithLogits(features=z, labels=tensor(self.LABELS)).backprop

        blocks = kg.batch_jacobian(difference)(tensor(self.LOGITS))
        close(blocks, [np.diag(p) - np.outer(p, p) for p in self.softmax()])


class TestSingularValues:
    @pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (2, 3, 3)])
    def test_a_matrix_from_its_parts_has_the_gradient_of_the_matrix(self, shape):
        x, c = RANDOM.normal(size=shape), RANDOM.normal(size=shape)

        def total(x):
            u, s, vt = ops.svd(x, full_matrices=False)
            return ops.sum(tensor(c) * ops.matmul(u * s[..., None, :], vt) ** 2)

        v = RANDOM.normal(size=shape)
        close(kg.grad(total)(tensor(x)), 2 * c * x, 1e-3)
        close(kg.hvp(total, (tensor(x),), (tensor(v),))[0], 2 * c * v, 1e-2)

    @pytest.mark.skipif(not ON_TENSORFLOW, reason="JAX and torch give NaN where two singular values are 0")
    def test_the_largest_of_a_matrix_of_rank_one(self):
        """At a b' with unit vectors: d^2 |x| along v = |v b|^2 + |v' a|^2 - 2 (a' v b)^2, over the singular value."""
        a, b, size = np.array([0.6, 0.8, 0.0]), np.array([0.0, 1.0, 0.0]), 2.0
        v = RANDOM.normal(size=(3, 3))
        x = tensor(size * np.outer(a, b))

        def largest(x):
            return ops.svd(x, compute_uv=False)[0]

        along = ops.sum(kg.hvp(largest, (x,), (tensor(v),))[0] * tensor(v))
        inner = a @ v @ b
        close(along, (np.sum((v @ b) ** 2) + np.sum((a @ v) ** 2) - 2 * inner**2) / size, 1e-3)

    def test_equal_ones_give_no_wrong_number(self):
        x, v = tensor(np.eye(2)), tensor([[0.3, 0.5], [-0.2, 0.1]])

        def squares(x):
            return ops.sum(ops.svd(x, compute_uv=False) ** 2)

        def rebuilt(x):
            u, s, vt = ops.svd(x, full_matrices=False)
            return ops.sum(v * ops.matmul(u * s, vt))

        close(kg.grad(squares)(x), 2 * np.eye(2))
        for found, right in ((kg.hvp(squares, (x,), (v,))[0], 2 * v), (kg.grad(rebuilt)(x), v)):
            found, right = ops.convert_to_numpy(found), ops.convert_to_numpy(right)
            is_right = np.allclose(found, right, rtol=1e-3, atol=1e-5)
            assert is_right or not np.all(np.isfinite(found))
