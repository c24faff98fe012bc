"""What the pictures of curvature show: the numbers, their places, and the names beside them."""

import matplotlib

matplotlib.use("agg")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import layers  # noqa: E402
from matplotlib import pyplot  # noqa: E402

import keras_gradtools as kg  # noqa: E402
from keras_gradtools import plots  # noqa: E402

RNG = np.random.default_rng(0)


@pytest.fixture
def ax():
    figure, ax = pyplot.subplots()
    yield ax
    pyplot.close(figure)


@pytest.fixture(scope="module")
def hessian():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, "tanh", name="a"), layers.Dense(1, name="b")])
    x, y = RNG.normal(size=(8, 3)).astype("float32"), RNG.normal(size=(8, 1)).astype("float32")
    return kg.curvature.Hessian(model, "mse", (x, y), verbose=0)


def test_hessian_has_its_blocks_marked(ax, hessian):
    matrix = hessian.dense()
    assert plots.plot_hessian(matrix, ax, hessian) is ax
    np.testing.assert_array_equal(ax.images[-1].get_array(), matrix)
    low, high = ax.images[-1].get_clim()
    assert -low == high == pytest.approx(np.abs(matrix).max())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a/kernel", "a/bias", "b/kernel", "b/bias"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a/kernel", "a/bias", "b/kernel", "b/bias"]
    # 6 + 2 + 2 + 1 parameters: the lines are between them.
    assert sorted({float(line.get_ydata()[0]) for line in ax.lines if line.get_xdata()[0] == 0}) == [5.5, 7.5, 9.5]
    np.testing.assert_allclose(ax.get_yticks(), [2.5, 6.5, 8.5, 10.0])


def test_hessian_of_blocks(ax, hessian):
    plots.plot_hessian(hessian.blocks(), ax)
    np.testing.assert_allclose(ax.images[-1].get_array(), hessian.dense())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2", "3"]
    assert sorted({float(line.get_ydata()[0]) for line in ax.lines if line.get_xdata()[0] == 0}) == [5.5, 7.5, 9.5]


def test_hessian_of_blocks_by_name(ax, hessian):
    plots.plot_hessian(hessian.blocks(), ax, hessian)
    assert [t.get_text() for t in ax.get_yticklabels()][0] == "a/kernel"


def test_hessian_of_a_function(ax):
    blocks = kg.hessian(lambda p: p["a"] ** 2 * keras.ops.sum(p["b"]))({"a": 3.0, "b": np.ones(2, "float32")})
    plots.plot_hessian(blocks, ax)
    np.testing.assert_allclose(ax.images[-1].get_array(), [[4, 6, 6], [6, 0, 0], [6, 0, 0]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_hessian_of_lists(ax):
    plots.plot_hessian([[1.0, 2.0], [2.0, 1.0]], ax)
    assert ax.images[-1].get_array().shape == (2, 2) and not ax.lines


def test_hessian_refuses_blocks_that_do_not_fit(ax):
    with pytest.raises(ValueError, match=r"nested blocks.*Received: blocks of the shapes \(2, 2\), \(2, 3\)"):
        plots.plot_hessian([[np.ones((2, 2)), np.ones((2, 3))], [np.ones((2, 2)), np.ones((1, 1))]], ax)


def test_hessian_without_blocks(ax):
    assert not plots.plot_hessian(np.eye(3), ax=ax).lines


@pytest.mark.parametrize(
    ("matrix", "blocks", "match"),
    [
        (np.ones((2, 3)), None, "square"),
        (np.eye(3), {"a": slice(0, 2)}, "of size 2"),
        (np.eye(3), "kernel", "curvature operator or a dict"),
        (np.ones(3), None, r"\(n, n\)"),
    ],
)
def test_hessian_refuses(ax, matrix, blocks, match):
    with pytest.raises(ValueError, match=match):
        plots.plot_hessian(matrix, ax, blocks)


def test_spectral_density(ax, hessian):
    density = hessian.spectral_density(3, 5)
    assert plots.plot_spectral_density(density, ax) is ax
    line = next(line for line in ax.lines if line.get_label() == "density")
    np.testing.assert_array_equal(line.get_xdata(), density.grid)
    floor = 1e-6 * density.density.max()
    np.testing.assert_allclose(line.get_ydata(), np.maximum(density.density, floor))
    assert ax.get_yscale() == "log" and ax.get_ylabel().startswith("density")
    with pytest.raises(ValueError, match="spectral_density"):
        plots.plot_spectral_density([1.0], ax)
    with pytest.raises(ValueError, match="floor"):
        plots.plot_spectral_density(density, ax, floor=2)


def test_eigenvalue_history_of_fit(ax):
    history = {
        "loss": [3.0, 2.0, 1.0],
        "hessian_max_eigenvalue": [1.0, 9.0, 400.0],
        "hessian_min_eigenvalue": [-1, -2, -3],
    }
    assert plots.plot_eigenvalue_history(history, ax) is ax
    lines = {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"hessian_max_eigenvalue", "hessian_min_eigenvalue"}
    np.testing.assert_array_equal(lines["hessian_max_eigenvalue"], [1, 9, 400])
    assert ax.get_yscale() == "symlog"

    class History:
        pass

    fitted = History()
    fitted.history = history
    assert len(plots.plot_eigenvalue_history(fitted, pyplot.figure().gca(), keys=["loss"]).lines) == 2
    pyplot.close()


def test_eigenvalue_history_of_numbers(ax):
    plots.plot_eigenvalue_history(np.array([[1.0, 2.0], [3.0, np.nan]]), ax)
    assert [line.get_label() for line in ax.lines][:2] == ["eigenvalue 1", "eigenvalue 2"]
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize(("history", "keys"), [({"loss": [1.0]}, None), ({"loss": [1.0]}, ["accuracy"])])
def test_eigenvalue_history_refuses(ax, history, keys):
    with pytest.raises(ValueError, match="eigenvalues in it"):
        plots.plot_eigenvalue_history(history, ax, keys)


def test_loss_surface_is_that_of_the_model(ax, hessian):
    directions = RNG.normal(size=(11, 2)).astype("float32")
    surface = hessian.loss_surface(directions, distance=0.5, points=3)
    units = directions / np.linalg.norm(directions, axis=0)
    model, before = hessian.model, hessian.model.get_weights()
    for i, a in enumerate(surface.first):
        for j, b in enumerate(surface.second):
            offset = units @ np.array([a, b], "float32")
            parts = [offset[s].reshape(w.shape) for s, w in zip(hessian.slices, before, strict=True)]
            assert surface.loss[i, j] == pytest.approx(hessian.loss(parts), rel=1e-5)
            model.set_weights([w + d for w, d in zip(before, parts, strict=True)])
            assert surface.loss[i, j] == pytest.approx(hessian.loss(), rel=1e-5)
            model.set_weights(before)
    curvature = np.einsum("ni,nm,mi->i", units, hessian.dense(), units)
    np.testing.assert_allclose(surface.curvatures, curvature, rtol=1e-4)
    assert plots.plot_loss_surface(surface, ax) is ax
    assert f"{curvature[0]:.3g}" in ax.get_xlabel() and f"{curvature[1]:.3g}" in ax.get_ylabel()


def test_loss_surface_is_along_the_top_eigenvectors_by_default(hessian):
    surface = hessian.loss_surface(points=2)
    np.testing.assert_allclose(surface.curvatures, np.linalg.eigvalsh(hessian.dense())[:-3:-1], rtol=1e-4)


def test_loss_surface_is_drawn_with_the_first_direction_to_the_right(ax):
    line = np.linspace(-1.0, 1.0, 9)
    surface = kg.curvature.LossSurface(line, line, 10 * line[:, None] ** 2 + line**2, np.array([20.0, 2.0]))
    plots.plot_loss_surface(surface, ax)
    # Along the steep direction the valley is narrow: the lowest level is higher than it is wide.
    width, height = np.ptp(ax.collections[0].get_paths()[0].vertices, axis=0)
    assert height > 2 * width


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"distance": 0.0}, "positive number as `distance`"),
        ({"points": 1}, "`points`"),
        ({"directions": np.ones((3, 2))}, "`directions`"),
        ({"directions": np.zeros((11, 2))}, "none of them zero"),
    ],
)
def test_loss_surface_refuses(hessian, options, match):
    with pytest.raises(ValueError, match=match):
        hessian.loss_surface(**options)


def test_plot_of_a_loss_surface_refuses(ax):
    with pytest.raises(ValueError, match="loss_surface"):
        plots.plot_loss_surface(np.eye(3), ax)
    line = np.linspace(-1, 1, 3)
    with pytest.raises(ValueError, match="a surface without any"):
        plots.plot_loss_surface(kg.curvature.LossSurface(line, line, np.full((3, 3), np.nan), [0, 0]), ax)
