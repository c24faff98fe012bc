"""Where the wrappers of `kg.models` can be saved, and what a fresh process needs to load them."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_gradtools as kg

X, Y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")


def wrappers():
    def model():
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "tanh")])

    return [
        kg.models.InputGradientRegularized(model(), 0.1),
        kg.models.AdversarialTraining(model(), kg.attacks.FGSM(0.1)),
        kg.models.SecondOrder(model()),
    ]


@pytest.mark.parametrize("ending", ["h5", "hdf5"])
def test_hdf5_is_refused_since_it_could_not_be_loaded(tmp_path, ending):
    for wrapper in wrappers():
        for path in (tmp_path / f"a.{ending}", str(tmp_path / f"a.{ending}")):
            with pytest.raises(
                ValueError, match=rf"{type(wrapper).__name__} .*`\.keras`.*Received: filepath=.*{ending}"
            ):
                wrapper.save(path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_in_hdf5_is_refused_too(tmp_path):
    wrapper = wrappers()[0]
    wrapper.compile("sgd", "mse")
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="InputGradientRegularized .*`save_weights`"):
        wrapper.fit(X, Y, verbose=0, callbacks=[checkpoint])


def test_weights_in_hdf5_and_the_whole_wrapper_are_loaded(tmp_path):
    for wrapper in wrappers():
        expected = wrapper.predict(X, verbose=0)
        wrapper.save(tmp_path / "a.keras", overwrite=True)
        np.testing.assert_array_equal(keras.models.load_model(tmp_path / "a.keras").predict(X, verbose=0), expected)
        wrapper.save_weights(tmp_path / "a.weights.h5", overwrite=True)
        wrapper.model.set_weights([0 * w for w in wrapper.model.get_weights()])
        wrapper.load_weights(tmp_path / "a.weights.h5")
        np.testing.assert_array_equal(wrapper.predict(X, verbose=0), expected)


LOAD = """
import sys
import keras
{}
for path in sys.argv[1:]:
    print(type(keras.models.load_model(path)).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("line", ["import keras_gradtools", ""])
def test_importing_the_package_is_enough_to_load(tmp_path, line):
    paths = [tmp_path / f"{number}.keras" for number in range(3)]
    for wrapper, path in zip(wrappers(), paths, strict=True):
        wrapper.save(path)
    root = str(pathlib.Path(kg.__file__).resolve().parent.parent)
    ran = subprocess.run(
        [sys.executable, "-c", LOAD.format(line), *paths],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": keras.config.backend(), "PYTHONPATH": root},
    )
    if line:
        assert ran.stdout.split() == [type(wrapper).__name__ for wrapper in wrappers()], ran.stderr
    else:
        assert "Could not locate class 'InputGradientRegularized'" in ran.stderr
