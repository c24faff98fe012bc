"""What `plots` puts on an Axes: the numbers, where they are, and the scale of the colours."""

import sys

import matplotlib

matplotlib.use("agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import ops  # noqa: E402
from matplotlib import pyplot  # noqa: E402

from keras_gradtools import plots  # noqa: E402


@pytest.fixture
def ax():
    figure, ax = pyplot.subplots()
    yield ax
    pyplot.close(figure)


def drawn(ax):
    return np.ma.filled(ax.images[-1].get_array(), np.nan)


@pytest.mark.parametrize(
    ("image", "limit", "expected"),
    [
        ([[0.0, 1.0], [-3.0, 2.0]], None, 3.0),
        ([[0.0, 1.0], [np.nan, -np.inf]], None, 1.0),
        ([[0, 0]], None, 1.0),
        ([[0.0, 1.0]], 0.5, 0.5),
    ],
)
def test_zero_is_in_the_middle(ax, image, limit, expected):
    assert plots.imshow_zero_center(image, ax, limit=limit) is ax
    assert ax.images[-1].get_clim() == (-expected, expected)
    np.testing.assert_array_equal(drawn(ax), np.where(np.isfinite(image), image, drawn(ax)))
    # On the default colour map zero is white.
    assert min(ax.images[-1].cmap(0.5)) > 0.95


def test_tensors_and_the_current_axes(ax):
    pyplot.sca(ax)
    assert plots.imshow_zero_center(ops.ones((2, 3), dtype="bfloat16")) is ax
    np.testing.assert_array_equal(drawn(ax), np.ones((2, 3)))


@pytest.mark.parametrize("colorbar", [True, False])
def test_colorbar(ax, colorbar):
    plots.imshow_zero_center([[1.0]], ax, colorbar=colorbar)
    assert len(ax.figure.axes) == 1 + colorbar


JACOBIANS = [
    ((4, 2, 4, 3), None, lambda j, r, c: j[:, r, :, c]),
    ((4, 2, 3), None, lambda j, r, c: j[c]),
    ((4, 2, 3, 5), (2, 3), lambda j, r, c: j[r, c]),
    ((4, 2, 3, 5), (3, 0), lambda j, r, c: j[:, r, c, :].T),
    ((4, 2, 3), (0, 2), lambda j, r, c: j[:, c]),
]


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize(("shape", "patch_axes", "patch"), JACOBIANS)
def test_every_patch_is_in_its_place(ax, shape, patch_axes, patch, pad):
    jacobian = np.random.default_rng(0).normal(size=shape)
    assert plots.plot_as_patches(jacobian, ax, patch_axes, pad=pad, colorbar=False) is ax
    image = drawn(ax)
    height, width = patch(jacobian, 0, 0).shape
    rows, columns = len(ax.get_yticks()), len(ax.get_xticks())
    assert image.shape == (rows * (height + pad) - pad, columns * (width + pad) - pad)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + pad), c * (width + pad)
            np.testing.assert_array_equal(image[top : top + height, left : left + width], patch(jacobian, r, c))
            assert ax.get_yticks()[r] == top + (height - 1) / 2 and ax.get_xticks()[c] == left + (width - 1) / 2
    # Everything else separates, and is not a number.
    assert np.isfinite(image).sum() == jacobian.size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.imshow_zero_center(np.ones(3)), "of shape (height, width), without empty axes. Received"),
        (lambda: plots.imshow_zero_center(np.ones((0, 3))), "a ndarray of dtype float64 and shape (0, 3)"),
        (lambda: plots.imshow_zero_center(np.ones((2, 2), "complex64")), "expects real numbers"),
        (lambda: plots.imshow_zero_center([["a"]]), "expects real numbers"),
        (lambda: plots.imshow_zero_center([[1.0]], limit=0), "Received: limit=0"),
        (lambda: plots.imshow_zero_center([[1.0]], limit="1"), "Received: limit='1'"),
        (lambda: plots.plot_as_patches(np.ones((2, 2))), "(batch, out, in) or (batch, out, batch, in)"),
        (lambda: plots.plot_as_patches(np.ones((2, 2, 2)), patch_axes=(0, 3)), "from 0 to 2 as `patch_axes`"),
        (lambda: plots.plot_as_patches(np.ones((2, 2, 2)), patch_axes=(1, 1)), "Received: patch_axes=(1, 1)"),
        (lambda: plots.plot_as_patches(np.ones((2, 2, 2)), patch_axes=1), "Received: patch_axes=1"),
        (lambda: plots.plot_as_patches(np.ones((2, 2, 2)), pad=-1), "Received: pad=-1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "keras-gradtools\[plots\]"'):
        plots.imshow_zero_center([[1.0]])


def test_jacobians_side_by_side_have_one_scale():
    independent = np.einsum("bc,oi->boci", np.eye(4), np.ones((2, 3)))
    a, b = plots.plot_jacobians({"a": independent, "b": independent - 3.0})
    figure, bar = a.figure, a.figure.axes[2]
    assert (a.get_title(), b.get_title(), bar.get_ylabel()) == ("a", "b", "derivative")
    assert a.images[-1].get_clim() == b.images[-1].get_clim() == (-3.0, 3.0)
    assert a.images[-1].get_array().shape == (9, 14)
    pyplot.close(figure)


def test_jacobians_on_axes_and_with_a_limit():
    figure, ax = pyplot.subplots()
    assert plots.plot_jacobians({"one": np.ones((2, 3, 3))}, ax, limit=5.0).tolist() == [ax]
    assert ax.images[-1].get_clim() == (-5.0, 5.0)
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("jacobians", "match"),
    [
        ({}, "an empty dict"),
        ([np.ones((2, 3, 3))], "from titles to Jacobians. Received: .*builtins.list"),
        ({"a": np.ones((2, 2))}, "expects real"),
    ],
    ids=["empty", "list", "matrix"],
)
def test_jacobians_refuses(jacobians, match):
    with pytest.raises(ValueError, match=f"(?s){match}"):
        plots.plot_jacobians(jacobians)
