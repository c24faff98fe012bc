"""Every plot on light and dark backgrounds: what it draws is visible, and told apart without colors."""

import matplotlib

matplotlib.use("agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from matplotlib import colors, pyplot  # noqa: E402

import keras_gradtools as kg  # noqa: E402
from keras_gradtools.drawing import pyplot as drawing  # noqa: E402
from keras_gradtools.drawing import styles  # noqa: E402
from tests.drawing.every_plot import PLOTS  # noqa: E402

LEAST_CONTRAST = 1.7


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def luminance(color):
    rgb = np.array(colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def series(ax):
    """The lines that have a name, and lines of measurements, without the caps of bars and guides such as at zero."""
    lines = [line for line in ax.lines if line.get_marker() != "_"]
    return [line for line in lines if not line.get_label().startswith("_") or len(line.get_xdata()) > 2]


def test_every_plot_is_listed():
    assert {name.partition(",")[0] for name in PLOTS} == set(kg.plots.__all__)


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("name", PLOTS)
def test_visible_and_told_apart(name, style):
    count, draw = PLOTS[name]
    with pyplot.style.context(style):
        found = np.array([draw(None)], dtype=object).ravel()
        assert len(found) == count and pyplot.get_fignums() == [found[0].figure.number]
        assert found[0].figure.get_layout_engine() is not None
        for ax in found:
            lines = series(ax)
            if not ax.images and name != "plot_loss_surface":
                behind = colors.to_hex(ax.get_facecolor())
                assert all(contrast(line.get_color(), behind) > LEAST_CONTRAST for line in ax.lines)
            shapes = [(line.get_marker(), str(line.get_linestyle())) for line in lines]
            assert len(set(shapes)) == len(shapes)
            for text in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()]:
                assert contrast(text.get_color(), ax.figure.get_facecolor()) > 7


@pytest.mark.parametrize("name", PLOTS)
def test_the_axes_that_were_given(name):
    count, draw = PLOTS[name]
    figure, axes = pyplot.subplots(1, count, squeeze=False)
    given = list(axes[0]) if count > 1 else axes[0, 0]
    found = draw(given)
    assert found is given if count == 1 else list(found) == given
    assert pyplot.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", [name for name, (count, _) in PLOTS.items() if count > 1])
@pytest.mark.parametrize(
    ("ax", "match"), [(3, "Received: 1 objects"), (["a", "b"], r"Received: \['a', 'b'\]")], ids=["int", "strings"]
)
def test_other_axes_are_refused(name, ax, match):
    with pytest.raises(ValueError, match=f"expects 2 matplotlib Axes in a list as `ax`. {match}"):
        PLOTS[name][1](ax)


@pytest.mark.parametrize("name", [n for n in PLOTS if n.startswith(("plot_eigen", "plot_rob", "plot_sing"))])
def test_no_legend_over_a_curve(name):
    for ax in np.array([PLOTS[name][1](None)], dtype=object).ravel():
        ax.figure.draw_without_rendering()
        legend = ax.get_legend()
        if legend is None:
            continue
        box = legend.get_window_extent()
        for line in series(ax):
            points = ax.transData.transform(np.column_stack(line.get_data()))
            points = points[np.isfinite(points).all(axis=1)]
            inside = (
                (points[:, 0] > box.x0) & (points[:, 0] < box.x1) & (points[:, 1] > box.y0) & (points[:, 1] < box.y1)
            )
            assert not inside.any()


@pytest.mark.parametrize("name", PLOTS)
def test_no_label_is_cut_off(name):
    for ax in np.array([PLOTS[name][1](None)], dtype=object).ravel():
        ax.figure.draw_without_rendering()
        box, page = ax.get_tightbbox(), ax.figure.bbox
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1


def test_series_are_told_apart():
    found = [styles.series_style(i) for i in range(36)]
    assert len({(s["marker"], s["linestyle"]) for s in found}) == 36
    assert {s["color"].lower() for s in found}.isdisjoint({"black", "#000000", "white", "#ffffff"})


def test_grades_rise_in_lightness():
    _, ax = pyplot.subplots()
    lightness = [float(luminance(color)) for color in styles.graded_colors(ax, 20)]
    assert lightness == sorted(lightness)


class TestEpochs:
    class Monitor:
        measured_at, step_unit = [1, 3], "epoch"

    class Batches:
        measured_at, step_unit = [10, 20], "batch"

    class History:
        epoch, history = [0, 1], {"loss": [1.0, 2.0]}

    @pytest.mark.parametrize(
        ("given", "places", "label"),
        [
            (Monitor, [2, 4], "epoch"),
            (Batches, [10, 20], "batch"),
            (History, [1, 2], "epoch"),
            ({"loss": [1.0, 2.0]}, [1, 2], "epoch"),
            ({"loss": [1.0]}, [1, 2], "measurement"),
            ([1.0, 2.0], [1, 2], "measurement"),
        ],
    )
    def test_known(self, given, places, label):
        found, name = drawing.epochs_or_measurements(given, 2)
        assert list(found) == places and name == label

    def test_of_two_trainings(self):
        monitor = type("Twice", (), {"measured_at": [0, 0], "step_unit": "epoch"})
        assert drawing.epochs_or_measurements(monitor, 2)[1] == "measurement"

    def test_of_another_count(self):
        assert drawing.epochs_or_measurements(self.Monitor, 3)[1] == "measurement"
