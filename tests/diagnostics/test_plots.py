"""What the pictures of a training show: the numbers of the monitors, their places, and the names beside them."""

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
def monitors():
    """The monitors of a training, and its history."""
    x, y = RNG.normal(size=(16, 4)).astype("float32"), RNG.normal(size=(16, 3)).astype("float32")
    parts = [layers.Dense(8, "relu", name="first"), layers.Dense(8, "relu", name="second"), layers.Dense(3, name="out")]
    model = keras.Sequential([keras.Input((4,)), *parts])
    model.set_weights([RNG.normal(size=w.shape) for w in model.get_weights()])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    jacobians = kg.callbacks.BatchJacobianMonitor(x[:5], quantities="spectral_norm")
    gradients = kg.callbacks.GradientMonitor((x, y))
    return jacobians, gradients, model.fit(x, y, epochs=3, verbose=0, callbacks=[jacobians, gradients])


def curves(ax):
    return [line.get_ydata() for line in ax.lines if len(line.get_xdata()) > 2]


# --- singular values ---


def test_singular_values_of_a_monitor(ax, monitors):
    monitor = monitors[0]
    assert plots.plot_singular_values(monitor, ax) is ax
    values = np.stack(monitor.spectra)
    values = np.maximum(values, 1e-8 * values.max())
    expected = np.median(values, axis=1).T
    np.testing.assert_allclose(curves(ax), expected, rtol=1e-6)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [r"$\sigma_{1}$", r"$\sigma_{2}$", r"$\sigma_{3}$"]
    assert ax.get_yscale() == "log" and ax.get_xlabel() and ax.get_ylabel().startswith("singular value")
    # Of the largest and the smallest, from the least to the greatest of the examples.
    ends = [collection.get_paths()[0].vertices[:, 1] for collection in ax.collections]
    for band, i in zip(ends, (0, 2), strict=True):
        assert (band.min(), band.max()) == pytest.approx((values[:, :, i].min(), values[:, :, i].max()))


def test_many_singular_values_have_a_colour_bar(ax):
    plots.plot_singular_values([np.exp(RNG.normal(size=(2, 20))) for _ in range(3)], ax)
    assert ax.get_legend() is None and len(curves(ax)) == 20
    assert len(ax.figure.axes) == 2 and "singular value" in ax.figure.axes[1].get_ylabel()


def test_zeros_and_what_is_not_finite(ax):
    spectra = np.array([[[2.0, 0.0]], [[np.nan, np.nan]], [[4.0, np.inf]]])
    plots.plot_singular_values(spectra, ax)
    first, second = curves(ax)
    np.testing.assert_array_equal(first, [2.0, np.nan, 4.0])
    assert second[0] == pytest.approx(4e-8) and np.isnan(second[1:]).all()
    plots.plot_singular_values(np.zeros((2, 1, 1)), ax)


@pytest.mark.parametrize(
    ("spectra", "match"),
    [
        ([], "an empty list"),
        (None, "None"),
        ([np.ones(3)], r"the shapes \[\(3,\)\]"),
        ([np.ones((2, 3)), np.ones((2, 4))], r"the shapes \[\(2, 3\), \(2, 4\)\]"),
        (kg.callbacks.BatchJacobianMonitor(np.ones((2, 3))), "an empty list"),
    ],
    ids=["empty", "None", "rank 1", "two shapes", "unused"],
)
def test_singular_values_refuses(ax, spectra, match):
    with pytest.raises(ValueError, match=f"expects the `spectra` of .*Received: {match}.*`method`"):
        plots.plot_singular_values(spectra, ax)


# --- gradient flow ---


@pytest.mark.parametrize("kind", ["monitor", "dict", "history", "dict of history"])
def test_gradient_flow(ax, monitors, kind):
    _, monitor, history = monitors
    given = {
        "monitor": monitor,
        "dict": monitor.layers["gradient_norm"],
        "history": history,
        "dict of history": history.history,
    }
    assert plots.plot_gradient_flow(given[kind], ax) is ax
    expected = np.array(list(monitor.layers["gradient_norm"].values())).T
    np.testing.assert_allclose(curves(ax), expected)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["first", "second", "out"]
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "gradient norm"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [f"{'measurement' if kind == 'dict' else 'epoch'} {i}" for i in (1, 2, 3)]


def test_many_measurements_have_a_color_bar(ax):
    plots.plot_gradient_flow({"a": np.arange(1.0, 9.0), "b": np.ones(8), "c": np.ones(8)}, ax)
    assert ax.get_legend() is None and ax.figure.axes[1].get_ylabel() == "measurement"


def test_singular_values_over_epochs(ax, monitors):
    plots.plot_singular_values(monitors[0], ax)
    assert ax.get_xlabel() == "epoch" and list(ax.lines[0].get_xdata()) == [1, 2, 3]


def test_gradient_flow_of_other_quantities(ax, monitors):
    _, monitor, _ = monitors
    plots.plot_gradient_flow(monitor, ax, "dead_units")
    assert ax.get_yscale() == "linear" and ax.get_ylabel() == "fraction of dead units"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["first", "second"]
    other = plots.plot_gradient_flow(monitor, pyplot.figure().gca(), "update_to_weight_ratio")
    assert "update" in other.get_ylabel()
    pyplot.close()


def test_gradient_flow_of_one_measurement_and_of_zeros(ax):
    plots.plot_gradient_flow({"a": [0.0], "b": [2.0], "c": [np.nan]}, ax)
    np.testing.assert_array_equal(curves(ax), [[2e-8, 2.0, np.nan]])
    assert len(ax.figure.axes) == 1


def test_a_layer_that_was_measured_later(ax):
    plots.plot_gradient_flow({"a": [1.0, 2.0], "b": [3.0, 3.0], "c": [5.0]}, ax)
    np.testing.assert_array_equal(curves(ax), [[1.0, 3.0, np.nan], [2.0, 3.0, 5.0]])


@pytest.mark.parametrize(
    ("layers", "options", "match"),
    [
        ({}, {}, "with 'gradient_norm' by layer"),
        ({"loss": 1.0}, {}, "with 'gradient_norm' by layer"),
        ({"gradient_norm": [1.0]}, {}, "with 'gradient_norm' by layer"),
        (3, {}, "Received: 3"),
        (kg.callbacks.GradientMonitor((np.ones((2, 1)), np.ones((2, 1)))), {}, "with 'gradient_norm' by layer"),
        ({"a": [1.0]}, {"quantity": "loss"}, "as `quantity`"),
    ],
    ids=["empty", "numbers", "no layers", "int", "unused", "quantity"],
)
def test_gradient_flow_refuses(ax, layers, options, match):
    with pytest.raises(ValueError, match=match):
        plots.plot_gradient_flow(layers, ax, **options)
