"""TensorFlow's guide "Advanced automatic differentiation", cell by cell, on any backend.

It follows https://www.tensorflow.org/guide/advanced_autodiff, with one function for each heading, in the guide's order.
Every printed number is checked against its closed form or an identity.

Run `python examples/advanced_autodiff.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It
writes its plots to out/.
"""

import argparse
import math
import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Arrays this small do not profit from several threads, and slow down if the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import ops

PARAMETERS = ("kernel 1", "bias 1", "kernel 2", "bias 2")


def normal(rng, shape, scale=1.0):
    """Random numbers that are the same on every backend."""
    return ops.convert_to_tensor(rng.normal(0.0, scale, shape).astype("float32"))


def dense(units, activation, rng):
    def initializer(shape, dtype=None):
        return normal(rng, shape, shape[0] ** -0.5)

    return keras.layers.Dense(units, activation=activation, kernel_initializer=initializer)


def number(x):
    return float(ops.convert_to_numpy(x))


def numbers(x):
    return ops.convert_to_numpy(x).astype("float64")


def flat(parts):
    return np.concatenate([numbers(part).ravel() for part in parts])


def assert_near(actual, expected, tolerance=1e-5):
    """Checks each entry, with a tolerance relative to the largest one."""
    actual, expected = numbers(actual), numbers(expected)
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=tolerance * np.abs(expected).max())


def heading(text):
    print(f"\n{text}")


def save(figure, path):
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"picture: {path.name}")


def stop_recording():
    heading("Stop recording")
    x = keras.Variable(2.0)
    y = keras.Variable(3.0)

    with kg.GradientTape() as t:
        x_sq = x * x
        with t.stop_recording():
            y_sq = y * y
        z = x_sq + y_sq

    grad = t.gradient(z, {"x": x, "y": y})

    print("dz/dx:", number(grad["x"]))  # 2*x => 4
    print("dz/dy:", grad["y"])
    assert number(grad["x"]) == 4.0
    assert grad["y"] is None


def reset_recording():
    heading("Reset/start recording from scratch")
    x = keras.Variable(2.0)
    y = keras.Variable(3.0)
    reset = True

    with kg.GradientTape() as t:
        y_sq = y * y
        if reset:
            # Throw out all the tape recorded so far.
            t.reset()
        z = x * x + y_sq

    grad = t.gradient(z, {"x": x, "y": y})

    print("dz/dx:", number(grad["x"]))  # 2*x => 4
    print("dz/dy:", grad["y"])
    assert number(grad["x"]) == 4.0
    assert grad["y"] is None


def stop_gradient():
    heading("Stop gradient flow with precision")
    x = keras.Variable(2.0)
    y = keras.Variable(3.0)

    with kg.GradientTape() as t:
        y_sq = y**2
        z = x**2 + kg.stop_gradient(y_sq)

    grad = t.gradient(z, {"x": x, "y": y})

    print("dz/dx:", number(grad["x"]))  # 2*x => 4
    print("dz/dy:", grad["y"])
    assert number(grad["x"]) == 4.0
    assert grad["y"] is None


# Establish an identity operation, but clip during the gradient pass.
@kg.custom_gradient
def clip_gradients(y):
    def backward(dy):
        norm = ops.sqrt(ops.sum(ops.square(dy)))
        return dy * ops.minimum(1.0, 0.5 / norm)

    return y, backward


def custom_gradients():
    heading("Custom gradients")
    v = keras.Variable(2.0)
    with kg.GradientTape() as t:
        output = clip_gradients(v * v)
    gradient = number(t.gradient(output, v))  # calls "backward", which clips 4 to 2
    print("clipped:", gradient)
    assert gradient == 2.0

    # The package includes this function.
    with kg.GradientTape() as t:
        output = kg.clip_gradient_norm(v * v, 0.5)
    assert number(t.gradient(output, v)) == 2.0


@keras.saving.register_keras_serializable(package="advanced_autodiff")
class MyModule(keras.Model):
    def call(self, x):
        return clip_gradients(x)


def custom_gradients_in_a_saved_model():
    heading("Custom gradients in SavedModel")
    v = keras.Variable(2.0)
    model = MyModule()
    model(v * v)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "saved_model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)

    # The loaded gradients will be the same as the above example.
    with kg.GradientTape() as t:
        output = loaded(v * v)
    gradient = number(t.gradient(output, v))
    print("clipped, after loading:", gradient)
    assert loaded is not model
    assert gradient == 2.0

    # The package's function adds a layer to a functional model, so you need no class of your own.
    inputs = keras.Input((1,))
    model = keras.Model(inputs, kg.clip_gradient_norm(inputs, 0.5))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "layer.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)

    with kg.GradientTape() as t:
        output = loaded(ops.reshape(v * v, (1, 1)))
    gradient = number(t.gradient(output, v))
    print("the same in a functional model:", gradient)
    assert gradient == 2.0


def multiple_tapes():
    heading("Multiple tapes")
    x0 = ops.convert_to_tensor(0.0)
    x1 = ops.convert_to_tensor(0.0)

    with kg.GradientTape() as tape0, kg.GradientTape() as tape1:
        tape0.watch(x0)
        tape1.watch(x1)

        y0 = ops.sin(x0)
        y1 = ops.sigmoid(x1)

        y = y0 + y1

        ys = ops.sum(y)

    by_x0 = number(tape0.gradient(ys, x0))  # cos(x) => 1.0
    by_x1 = number(tape1.gradient(ys, x1))  # sigmoid(x1)*(1-sigmoid(x1)) => 0.25
    print("dys/dx0:", by_x0)
    print("dys/dx1:", by_x1)
    assert by_x0 == 1.0
    assert by_x1 == 0.25


def higher_order_gradients():
    heading("Higher-order gradients")
    x = keras.Variable(1.0)  # Create a Keras variable initialized to 1.0

    with kg.GradientTape() as t2:
        with kg.GradientTape() as t1:
            y = x * x * x

        # Compute the gradient inside the outer `t2` context manager
        # which means the gradient computation is differentiable as well.
        dy_dx = t1.gradient(y, x)
    d2y_dx2 = t2.gradient(dy_dx, x)

    print("dy_dx:", number(dy_dx))  # 3 * x**2 => 3.0
    print("d2y_dx2:", number(d2y_dx2))  # 6 * x => 6.0
    assert number(dy_dx) == 3.0
    assert number(d2y_dx2) == 6.0


def input_gradient_regularization():
    heading("Example: Input gradient regularization")
    rng = np.random.default_rng(0)
    x = normal(rng, (7, 5))

    layer = dense(10, "relu", rng)

    with kg.GradientTape() as t2:
        # The inner tape only takes the gradient with respect to the input,
        # not the variables.
        with kg.GradientTape(watch_accessed_variables=False) as t1:
            t1.watch(x)
            out = ops.sum(layer(x) ** 2)
        # 1. Calculate the input gradient.
        g1 = t1.gradient(out, x)
        # 2. Calculate the magnitude of the input gradient.
        g1_mag = ops.norm(g1)

    # 3. Calculate the gradient of the magnitude with respect to the model.
    dg1_mag = t2.gradient(g1_mag, layer.trainable_variables)

    shapes = [tuple(var.shape) for var in dg1_mag]
    print(f"shapes: {shapes}")
    assert shapes == [(5, 10), (10,)]

    # With r = relu(x W + b), the input gradient is g1 = 2 r Wᵀ.
    x, w, b = numbers(x), numbers(layer.kernel), numbers(layer.bias)
    r = np.maximum(x @ w + b, 0.0)
    g = 2.0 * r @ w.T
    u = g / np.linalg.norm(g)
    by_r = 2.0 * (r > 0.0) * (u @ w)
    assert_near(g1_mag, np.linalg.norm(g))
    assert_near(dg1_mag[0], x.T @ by_r + 2.0 * u.T @ r)
    assert_near(dg1_mag[1], by_r.sum(axis=0))
    print(f"magnitude: {number(g1_mag):.4f}")


def scalar_source(out):
    from matplotlib import pyplot

    heading("Jacobians: Scalar source")
    x = ops.linspace(-10.0, 10.0, 200 + 1)
    delta = keras.Variable(0.0)

    with kg.GradientTape() as tape:
        y = ops.sigmoid(x + delta)

    dy_dx = tape.jacobian(y, delta)

    print(f"y.shape: {tuple(y.shape)}")
    print(f"dy_dx.shape: {tuple(dy_dx.shape)}")
    assert tuple(y.shape) == tuple(dy_dx.shape) == (201,)
    sigmoid = 1.0 / (1.0 + np.exp(-numbers(x)))
    assert_near(dy_dx, sigmoid * (1.0 - sigmoid))

    figure, ax = pyplot.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(numbers(x), numbers(y), label="y")
    ax.plot(numbers(x), numbers(dy_dx), label="dy/dx")
    ax.set(title="A sigmoid and its derivative", xlabel="x")
    ax.grid(alpha=0.3)
    ax.legend()
    save(figure, out / "guide_scalar_source.png")


def tensor_source():
    heading("Jacobians: Tensor source")
    rng = np.random.default_rng(1)
    x = normal(rng, (7, 5))
    layer = dense(10, "relu", rng)

    with kg.GradientTape(persistent=True) as tape:
        y = layer(x)

    print(f"y.shape: {tuple(y.shape)}")
    print(f"layer.kernel.shape: {tuple(layer.kernel.shape)}")

    j = tape.jacobian(y, layer.kernel)
    print(f"j.shape: {tuple(j.shape)}")
    assert tuple(j.shape) == (*y.shape, *layer.kernel.shape) == (7, 10, 5, 10)
    # An output depends only on its own column of the kernel, and only where ReLU is active.
    assert_near(j, np.einsum("bk,bi,kl->bkil", numbers(y) > 0.0, numbers(x), np.eye(10)))

    g = tape.gradient(y, layer.kernel)
    print(f"g.shape: {tuple(g.shape)}")

    j_sum = ops.sum(j, axis=[0, 1])
    delta = number(ops.max(ops.abs(g - j_sum)))
    assert delta < 1e-5
    print(f"delta: {delta:.1e}")


def hessian(out):
    from matplotlib import pyplot

    heading("Example: Hessian")
    rng = np.random.default_rng(2)
    inputs = normal(rng, (7, 5))
    layer1 = dense(8, "relu", rng)
    layer2 = dense(6, "relu", rng)

    with kg.GradientTape() as t2:
        with kg.GradientTape() as t1:
            x = layer1(inputs)
            x = layer2(x)
            loss = ops.mean(x**2)

        g = t1.gradient(loss, layer1.kernel)

    h = t2.jacobian(g, layer1.kernel)

    print(f"layer.kernel.shape: {tuple(layer1.kernel.shape)}")
    print(f"h.shape: {tuple(h.shape)}")
    assert tuple(h.shape) == (5, 8, 5, 8)

    n_params = int(np.prod(layer1.kernel.shape))

    g_vec = ops.reshape(g, (n_params, 1))
    h_mat = ops.reshape(h, (n_params, n_params))
    print(f"h_mat.shape: {tuple(h_mat.shape)}")

    # The Hessian matrix should be symmetric:
    assert_near(h_mat, ops.transpose(h_mat))
    # Between kinks the loss is quadratic in the kernel, and its Hessian is a product of the outputs' derivatives.
    passed1, passed2 = numbers(layer1(inputs)) > 0.0, numbers(x) > 0.0
    slopes = np.einsum("bo,bh,ho,bi->boih", passed2, passed1, numbers(layer2.kernel), numbers(inputs))
    slopes = slopes.reshape(-1, n_params)
    assert_near(h_mat, 2.0 / len(slopes) * slopes.T @ slopes)

    figure, ax = pyplot.subplots(figsize=(6, 5), layout="constrained")
    kg.plots.imshow_zero_center(h_mat, ax)
    ax.set(title="Hessian of the loss with respect to the first kernel", xlabel="weight", ylabel="weight")
    save(figure, out / "guide_hessian.png")

    eps = 1e-3
    eye_eps = ops.eye(n_params) * eps

    # X(k+1) = X(k) - (∇²f(X(k)))^-1 @ ∇f(X(k))
    # h_mat = ∇²f(X(k))
    # g_vec = ∇f(X(k))
    update = ops.solve(h_mat + eye_eps, g_vec)

    # Reshape the update and apply it to the variable.
    layer1.kernel.assign_sub(ops.reshape(update, layer1.kernel.shape))

    new_loss = ops.mean(layer2(layer1(inputs)) ** 2)
    print(f"loss: {number(loss):.4f} -> {number(new_loss):.4f}")
    assert number(new_loss) < number(loss)


def relu_gradient(x, kernel1, bias1, kernel2, bias2):
    """The gradient of the mean square of two relu layers with respect to their variables, derived by hand."""
    y1 = np.maximum(x @ kernel1 + bias1, 0.0)
    y2 = np.maximum(y1 @ kernel2 + bias2, 0.0)
    by_z2 = 2.0 / y2.size * y2
    by_z1 = by_z2 @ kernel2.T * (y1 > 0.0)
    return x.T @ by_z1, by_z1.sum(axis=0), y1.T @ by_z2, by_z2.sum(axis=0)


def full_hessian(out):
    from matplotlib import pyplot

    heading("The full Hessian across multiple variables")
    # The guide remarks that a whole model would need careful concatenation and slicing.
    rng = np.random.default_rng(2)
    x = normal(rng, (7, 5))
    model = keras.Sequential([keras.Input((5,)), dense(8, "relu", rng), dense(6, "relu", rng)])
    fun, weights = kg.functionalize(model)

    def loss_of(weights):
        return ops.mean(fun(weights, x) ** 2)

    loss, g = kg.value_and_grad(loss_of)(weights)
    blocks = kg.hessian(loss_of)(weights)
    h_mat, unravel = kg.flatten_hessian(blocks)
    g_vec = ops.concatenate([ops.reshape(part, (-1,)) for part in g])
    n_params = model.count_params()

    print(f"h_mat.shape: {tuple(h_mat.shape)}")
    assert tuple(h_mat.shape) == (n_params, n_params) == (102, 102)
    assert [tuple(part.shape) for part in unravel(g_vec)] == [(5, 8), (8,), (8, 6), (6,)]
    assert_near(h_mat, ops.transpose(h_mat))

    # A Hessian-vector product is a derivative of the gradient and needs no matrix, so it suits larger models.
    v = [normal(rng, w.shape) for w in weights]
    (product,) = kg.hvp(loss_of, (weights,), (v,))
    x64, w64, v64 = numbers(x), [numbers(w) for w in weights], [numbers(part) for part in v]
    after, before = (
        relu_gradient(x64, *(w + step * part for w, part in zip(w64, v64, strict=True))) for step in (1e-6, -1e-6)
    )
    change = flat([(a - b) / 2e-6 for a, b in zip(after, before, strict=True)])
    assert_near(g_vec, flat(relu_gradient(x64, *w64)))
    assert_near(flat(product), change)
    assert_near(numbers(h_mat) @ flat(v), change)

    figure, ax = pyplot.subplots(figsize=(7, 6), layout="constrained")
    kg.plots.imshow_zero_center(h_mat, ax)
    sizes = [math.prod(w.shape) for w in weights]
    ends = np.cumsum(sizes)
    middles = [end - (size + 1) / 2 for end, size in zip(ends, sizes, strict=True)]
    ax.set_xticks(middles, PARAMETERS)
    ax.set_yticks(middles, PARAMETERS, rotation="vertical", verticalalignment="center")
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="0.6", linewidth=0.8)
        ax.axvline(end - 0.5, color="0.6", linewidth=0.8)
    ax.set(title="Hessian of the loss with respect to all variables")
    save(figure, out / "guide_full_hessian.png")

    # The Hessian is indefinite, because the kernels are multiplied with one another. The loss could rise if eps were
    # smaller than the negative curvature.
    lowest = float(np.linalg.eigvalsh(numbers(h_mat))[0])
    print(f"lowest eigenvalue: {lowest:.4f}")
    assert lowest < 0.0
    eps = 1e-3 - 2.0 * lowest
    eye_eps = ops.eye(n_params) * eps

    update = unravel(ops.solve(h_mat + eye_eps, g_vec))
    for variable, part in zip(model.trainable_variables, update, strict=True):
        variable.assign_sub(part)

    new_loss = ops.mean(model(x) ** 2)
    print(f"loss: {number(loss):.4f} -> {number(new_loss):.4f}")
    assert number(new_loss) < number(loss)


def closed_form_jacobian(x, layer1, layer2, normalize=None):
    """The Jacobian of `layer2(normalize(layer1(x)))` with respect to x, for elu layers without a bias."""
    kernel1, kernel2 = numbers(layer1.kernel), numbers(layer2.kernel)
    z = numbers(x) @ kernel1
    slope1 = np.exp(np.minimum(z, 0.0))
    y = np.where(z > 0.0, z, slope1 - 1.0)
    # The derivatives of the features of example b with respect to the same features of example c.
    between = np.eye(len(y))[:, :, None] + np.zeros(y.shape)
    if normalize is not None:
        y, between = normalize(y)
    slope2 = np.exp(np.minimum(y @ kernel2, 0.0))
    return np.einsum("bo,ho,bch,ch,ih->boci", slope2, kernel2, between, slope1, kernel1, optimize=True)


def batch_jacobian(out):
    from matplotlib import pyplot

    heading("Batch Jacobian")
    rng = np.random.default_rng(3)
    x = normal(rng, (7, 5))

    layer1 = dense(8, "elu", rng)
    layer2 = dense(6, "elu", rng)

    with kg.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = layer1(x)
        y = layer2(y)

    print(f"y.shape: {tuple(y.shape)}")

    j = tape.jacobian(y, x)
    print(f"j.shape: {tuple(j.shape)}")
    assert tuple(j.shape) == (7, 6, 7, 5)
    assert_near(j, closed_form_jacobian(x, layer1, layer2))

    figure, ax = pyplot.subplots(figsize=(6, 5), layout="constrained")
    kg.plots.imshow_zero_center(j[:, 0, :, 0], ax)
    ax.set(title="A (batch, batch) slice", xlabel="example of the input", ylabel="example of the output")
    save(figure, out / "guide_slice.png")

    figure, ax = pyplot.subplots(figsize=(6.5, 6), layout="constrained")
    kg.plots.plot_as_patches(j, ax)
    ax.set(title="All (batch, batch) slices are diagonal", xlabel="input feature", ylabel="output feature")
    save(figure, out / "guide_patches.png")

    j_sum = ops.sum(j, axis=2)
    print(f"j_sum.shape: {tuple(j_sum.shape)}")
    j_select = ops.einsum("bxby->bxy", j)
    print(f"j_select.shape: {tuple(j_select.shape)}")
    assert tuple(j_sum.shape) == tuple(j_select.shape) == (7, 6, 5)
    assert_near(j_sum, j_select, 1e-6)

    jb = tape.batch_jacobian(y, x)
    print(f"jb.shape: {tuple(jb.shape)}")

    error = number(ops.max(ops.abs(jb - j_sum)))
    assert error < 1e-6
    print(f"error: {error:.1e}")

    # The same as a transform of a function or a model.
    model = keras.Sequential([keras.Input((5,)), layer1, layer2])
    assert_near(kg.batch_jacobian(model)(x), jb)


def batch_normalization(out):
    from matplotlib import pyplot

    heading("Batch Jacobian: where examples are not independent")
    rng = np.random.default_rng(4)
    x = normal(rng, (7, 5))

    layer1 = dense(8, "elu", rng)
    bn = keras.layers.BatchNormalization(name="batch_normalization")
    layer2 = dense(6, "elu", rng)

    with kg.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = layer1(x)
        y = bn(y, training=True)
        y = layer2(y)

    j = tape.jacobian(y, x)
    print(f"j.shape: {tuple(j.shape)}")
    assert tuple(j.shape) == (7, 6, 7, 5)

    def normalize(y):
        deviation = np.sqrt(y.var(axis=0) + bn.epsilon)
        y, n = (y - y.mean(axis=0)) / deviation, len(y)
        return y, (np.eye(n)[:, :, None] - 1.0 / n - y[:, None] * y[None] / n) / deviation

    assert_near(j, closed_form_jacobian(x, layer1, layer2, normalize))
    blocks = numbers(j).swapaxes(1, 2)  # one block for each pair of examples
    between_examples = np.abs(blocks[~np.eye(7, dtype=bool)]).max(axis=(1, 2))
    print(f"entries between two examples reach {between_examples.max():.4f}")
    assert between_examples.min() > 1e-2

    figure, ax = pyplot.subplots(figsize=(6.5, 6), layout="constrained")
    kg.plots.plot_as_patches(j, ax)
    ax.set(
        title="These slices are not diagonal",
        xlabel="input feature\nDon't use `batch_jacobian`",
        ylabel="output feature",
    )
    save(figure, out / "guide_batch_normalization.png")

    without = kg.jacobian(lambda x: layer2(layer1(x)))(x)
    assert_near(without, closed_form_jacobian(x, layer1, layer2))
    axes = kg.plots.plot_jacobians({"without BatchNormalization": without, "with BatchNormalization, in training": j})
    for ax in axes:
        ax.set(xlabel="input feature", ylabel="output feature")
    save(axes[0].figure, out / "guide_side_by_side.png")

    jb = tape.batch_jacobian(y, x)
    print(f"jb.shape: {tuple(jb.shape)}")
    assert tuple(jb.shape) == (7, 6, 5)
    # Each entry is a sum over the outputs of the whole batch, not the derivative of its own example's output.
    assert_near(jb, blocks.sum(axis=0))
    own = blocks[np.arange(7), np.arange(7)]
    difference = np.abs(numbers(jb) - own).max()
    print(f"difference from the diagonal: {difference:.4f}")
    assert difference > 0.1

    # `batch_independence` detects this in advance, and names the layer.
    model = keras.Sequential([keras.Input((5,)), layer1, bn, layer2], name="guide")
    report = kg.diagnostics.batch_independence(model, x, training=True)
    print(str(report))
    assert not report.independent and report.layers == ("batch_normalization",)
    try:
        kg.batch_jacobian(model, check_independence=True)(x, training=True)
    except ValueError as error:
        assert "batch_normalization" in str(error)
    else:
        raise AssertionError("the check must refuse this model")
    assert kg.diagnostics.batch_independence(model, x).independent


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plots")
    out = parser.parse_args(arguments).out
    import matplotlib

    matplotlib.use("agg")
    out.mkdir(parents=True, exist_ok=True)

    print(f"Advanced automatic differentiation, {keras.config.backend()}")
    stop_recording()
    reset_recording()
    stop_gradient()
    custom_gradients()
    custom_gradients_in_a_saved_model()
    multiple_tapes()
    higher_order_gradients()
    input_gradient_regularization()
    scalar_source(out)
    tensor_source()
    hessian(out)
    full_hessian(out)
    batch_jacobian(out)
    batch_normalization(out)
    print(f"\nAll checks passed. Pictures: guide_*.png in {out}/")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
