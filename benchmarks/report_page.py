"""The picture of docs/report.md: `python -m benchmarks.report_page [--browser chromium]`.

Trains a classifier of digits with faults, runs `keras-gradtools report` on it, and takes a picture of the page, which
needs Chromium. Writes docs/report.png.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

from benchmarks.run import ROOT

WIDTH, HEIGHT = 1000, 1000
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run", "--hide-scrollbars")


def save_example(folder):
    """Saves a deep network of sigmoid layers with a layer of dead units, and digits."""
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(0)
    digits = load_digits()
    x, y = (digits.images / 16).astype("float32").reshape(-1, 64), digits.target
    hidden = [layers.Dense(32, "sigmoid", name=f"sigmoid_{i}") for i in range(1, 8)]
    pruned = layers.Dense(32, "relu", name="relu", bias_initializer=keras.initializers.Constant(-4.0))
    parts = [*hidden, pruned, layers.BatchNormalization(name="norm"), layers.Dense(10, name="out")]
    model = keras.Sequential([keras.Input((64,)), *parts], name="digits")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.fit(x, y, epochs=2, verbose=0)
    model.save(folder / "digits.keras")
    np.savez(folder / "digits.npz", x=x[-300:], y=y[-300:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_example(folder)
        page, picture = folder / "report.html", ROOT / "docs" / "report.png"
        files = [folder / "digits.keras", folder / "digits.npz", "-o", page]
        subprocess.run([sys.executable, "-m", "keras_gradtools", "report", *files], check=True, cwd=ROOT)
        window = [f"--screenshot={picture}", f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={folder / 'browser'}"]
        subprocess.run([options.browser, *OPTIONS, *window, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    print("Wrote docs/report.png")


if __name__ == "__main__":
    main()
