"""Trains a WGAN-GP on scikit-learn's digits, generator and critic in one ordinary `fit`.

`fit` has one loss and one optimizer, which are the generator's here. The critic is trained while that loss is computed,
with its own tape and optimizer. For `fit`, the critic's weights are state, which every backend carries from step to
step like the statistics of BatchNormalization.

Source: Gulrajani et al., "Improved training of Wasserstein GANs" (arXiv:1704.00028), algorithm 1.

Run `python examples/wgan_gp.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes its
plot to out/.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Models this small do not profit from several threads, and slow down if the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers, ops

NOISE = 32
UNITS = 128
CRITIC_STEPS = 5
PENALTY_WEIGHT = 10.0
# A batch of `fit` contains one part for each of the critic's steps.
BATCH_SIZE = CRITIC_STEPS * 64
HELD_OUT = 160
COLORS = ("tab:blue", "tab:orange")


def load_data():
    """Training images in whole batches, their labels, and held-out images, with pixels from -1 to 1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    x, y = (digits.images[order, ..., None] / 8 - 1).astype("float32"), digits.target[order]
    rows = (len(x) - HELD_OUT) // BATCH_SIZE * BATCH_SIZE
    return x[:rows], y[:rows], x[-HELD_OUT:]


def build_generator():
    return keras.Sequential(
        [
            keras.Input((NOISE,)),
            layers.Dense(UNITS, activation="silu"),
            layers.Dense(UNITS, activation="silu"),
            layers.Dense(64, activation="tanh"),
            layers.Reshape((8, 8, 1)),
        ],
        name="generator",
    )


def build_critic():
    # No BatchNormalization, which would make the gradient of one image depend on the others. No kinks, because the
    # training gradient of the penalty misses them.
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(UNITS, activation="silu"),
            layers.Dense(UNITS, activation="silu"),
            layers.Dense(1),
        ],
        name="critic",
    )


def build_optimizer():
    # Without momentum, as in the paper, because each model's objective changes with every step of the other.
    return keras.optimizers.Adam(2e-3, beta_1=0.0, beta_2=0.9)


def interpolate(real, fake, seed=None):
    """A point on the segment between each real image and its fake one, uniformly distributed along it."""
    # One number per image. One per pixel would leave the segment, and one for all images would cover little of it.
    epsilon = keras.random.uniform((ops.shape(real)[0], 1, 1, 1), seed=seed)
    return epsilon * real + (1.0 - epsilon) * fake


def score(y, y_pred):
    """The scalar that is differentiated with respect to an image: the critic's only output."""
    return y_pred[:, 0]


def gradient_penalty(critic, mixed):
    """The mean of (n - 1) squared, where n is the norm of the gradient of an image's score with respect to it."""
    return kg.regularization.input_gradient_penalty(critic, mixed, target=score, center=1.0, method="exact")


def gradient_norm(critic, mixed):
    """The mean of the norms n of the gradients in `gradient_penalty`."""
    return kg.regularization.input_gradient_penalty(critic, mixed, target=score, squared=False, method="exact")


class WGANGP(keras.Model):
    """A generator trained by `fit(images)` with the optimizer of `compile`, and a critic trained along with it.

    Called on images, it generates the same number of images.
    """

    def __init__(self, generator, critic, critic_optimizer):
        super().__init__()
        self.generator, self.critic, self.critic_optimizer = generator, critic, critic_optimizer
        self.critic_weights = critic.trainable_variables
        # Here is the trick. Non-trainable weights are state of this model: `fit` leaves them out of its own gradient,
        # and keeps assignments to them, compiled or not.
        critic.trainable = False
        critic_optimizer.build(self.critic_weights)
        self.critic_optimizer_state = list(critic_optimizer.variables)
        self.seeds = keras.random.SeedGenerator(0)
        self.distance = keras.metrics.Mean(name="distance")
        self.gradient_norm = keras.metrics.Mean(name="gradient_norm")
        self.built = True

    def generate(self, count):
        return self.generator(keras.random.normal((count, NOISE), seed=self.seeds))

    def call(self, images, training=None):
        return self.generate(ops.shape(images)[0])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        # A constant, because otherwise the generator's gradient would also pass through the critic's training.
        fakes = ops.stop_gradient(self.generate(ops.shape(x)[0]))
        for real, fake in zip(ops.split(x, CRITIC_STEPS), ops.split(fakes, CRITIC_STEPS), strict=True):
            mixed = interpolate(real, fake, self.seeds)
            distance = self.train_critic(real, fake, mixed) if training else self.estimate(real, fake)
            self.distance.update_state(distance)
        self.gradient_norm.update_state(gradient_norm(self.critic, mixed))
        return -ops.mean(self.critic(y_pred))

    def estimate(self, real, fake):
        """The critic's estimate of the Wasserstein distance between the two, which the critic maximizes."""
        of_real, of_fake = ops.split(self.critic(ops.concatenate([real, fake])), 2)
        return ops.mean(of_real) - ops.mean(of_fake)

    def train_critic(self, real, fake, mixed):
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.critic_weights)
            distance = self.estimate(real, fake)
            loss = PENALTY_WEIGHT * gradient_penalty(self.critic, mixed) - distance
        gradients = tape.gradient(loss, self.critic_weights)
        self.critic_optimizer.apply([ops.stop_gradient(g) for g in gradients], self.critic_weights)
        return ops.stop_gradient(distance)


class ProgressLine(keras.callbacks.Callback):
    """One progress bar for the whole `fit`."""

    def __init__(self, progress):
        super().__init__()
        self.progress = progress

    def on_train_begin(self, logs=None):
        self.bar = self.progress.add_task("", total=self.params["epochs"], logs="")

    def on_epoch_end(self, epoch, logs=None):
        shown = "  ".join(f"{key} {logs[key]:.2f}" for key in ("distance", "val_distance", "gradient_norm"))
        self.progress.update(self.bar, advance=1, logs=shown)


def train(gan, x, held_out, epochs, console):
    from rich.progress import BarColumn, Progress

    gan.compile(build_optimizer())
    columns = (BarColumn(15), "{task.completed}/{task.total}", "{task.fields[logs]}")
    with Progress(*columns, console=console) as progress:
        # The critic is not trained on these images. If its distances for them and for training images agree, it has
        # not overfit.
        validation = {"validation_data": (held_out,), "validation_batch_size": HELD_OUT}
        callbacks = [ProgressLine(progress)]
        return gan.fit(x, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=callbacks, **validation).history


def generate(gan, count):
    noise = np.random.default_rng(1).normal(size=(count, NOISE)).astype("float32")
    return gan.generator.predict(noise, batch_size=count, verbose=0)


def nearest_distance(x, images):
    """The median distance of an image to the nearest real one, root mean square over the pixels (0 to 1)."""
    from sklearn.neighbors import KNeighborsClassifier

    neighbors = KNeighborsClassifier(1).fit(flat(x), np.zeros(len(x)))
    return float(np.median(neighbors.kneighbors(flat(images))[0])) / 2 / 8


def read(x, y, images):
    """The labels of the nearest real images."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(3).fit(flat(x), y).predict(flat(images))


def flat(images):
    return images.reshape(len(images), -1)


def grid(images, labels, columns=10):
    """One image with a row of `columns` images for each digit, padded with empty cells."""
    picture = np.full((10, columns, 10, 10), -1.0)
    for digit in range(10):
        chosen = images[labels == digit][:columns, ..., 0]
        picture[digit, : len(chosen), 1:-1, 1:-1] = chosen
    return picture.swapaxes(1, 2).reshape(100, 10 * columns)


def draw(history, fakes, fake_labels, x, y, path):
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(15, 5.2), layout="constrained")
    axes = figure.subplot_mosaic([["fake", "real", "distance"], ["fake", "real", "norm"]], width_ratios=(1, 1, 1.1))
    for name, images, labels, title in (
        ("fake", fakes, fake_labels, "Generated, sorted by the nearest real digits"),
        ("real", x, y, "Real"),
    ):
        axes[name].imshow(grid(images, labels), cmap="Greys", vmin=-1, vmax=1)
        axes[name].set(title=title, xticks=[], yticks=np.arange(10) * 10 + 4.5, yticklabels=range(10))
        axes[name].tick_params(length=0)
    epochs = np.arange(1, len(history["distance"]) + 1)
    for label, prefix, color in (("training images", "", COLORS[0]), ("held-out images", "val_", COLORS[1])):
        axes["distance"].plot(epochs, history[prefix + "distance"], color=color, label=label)
        axes["norm"].plot(epochs, history[prefix + "gradient_norm"], color=color, label=label, alpha=0.8)
    axes["distance"].set(title="Distance of generated from real, by the critic", yscale="log")
    axes["distance"].set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"], minor=False)
    axes["distance"].yaxis.set_minor_formatter("")
    axes["distance"].legend()
    axes["norm"].axhline(1.0, color="0.4", linestyle="--", linewidth=1)
    axes["norm"].set(title="Norm of the critic's gradient between real and fake", xlabel="epoch")
    for name in ("distance", "norm"):
        axes[name].grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds instead of a minute or two, and poor digits"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plot")
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")

    console = Console()
    keras.utils.set_random_seed(0)
    x, y, held_out = load_data()
    gan = WGANGP(build_generator(), build_critic(), build_optimizer())
    untrained = nearest_distance(x, generate(gan, 1000))

    steps = f"{CRITIC_STEPS} steps of the critic for each of the generator"
    console.print(f"WGAN-GP on {len(x)} digits of 8 x 8 pixels, {keras.config.backend()}: {steps}")
    start = time.perf_counter()
    history = train(gan, x, held_out, 12 if options.quick else 200, console)
    seconds = time.perf_counter() - start

    fakes = generate(gan, 1000)
    labels = read(x, y, fakes)
    numbers = {
        "steps": [int(optimizer.iterations) for optimizer in (gan.optimizer, gan.critic_optimizer)],
        "distance": history["distance"],
        "gradient_norm": history["gradient_norm"],
        "val_distance": history["val_distance"],
        "untrained": untrained,
        "generated": nearest_distance(x, fakes),
        "held out": nearest_distance(x, held_out),
        "shares": np.bincount(labels, minlength=10) / len(labels),
    }
    table = Table("", "distance to the nearest real digit", title_justify="left")
    for name in ("untrained", "generated", "held out"):
        table.add_row(name, f"{numbers[name]:.3f}")
    console.print(table)
    console.print(
        "share of each digit among the generated images: "
        + "  ".join(f"{d}: {s:.0%}" for d, s in enumerate(numbers["shares"]))
    )
    console.print(f"norm of the critic's gradient: {history['gradient_norm'][-1]:.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(history, fakes, labels, x, y, options.out / "wgan_gp.png")
    console.print(f"{seconds:.0f} s of training. Picture: wgan_gp.png in {options.out}/")
    return numbers


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
