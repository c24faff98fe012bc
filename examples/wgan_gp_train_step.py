"""Trains a WGAN-GP with a `train_step` of its own: one for TensorFlow and torch, and the stateless one of JAX.

The generator learns eight Gaussians on a circle. In each step, the critic takes five steps of its own, with a penalty
that holds the norm of its gradient at 1, and the generator takes one. On TensorFlow and torch, `train_step` changes the
variables. On JAX it is a pure function from the state to the new state, and the same steps run in a
`keras.StatelessScope`. examples/wgan_gp.py does the same without a `train_step`, with one code for all backends.

Source: Gulrajani et al., "Improved training of Wasserstein GANs" (arXiv:1704.00028), algorithm 1 and figure 3.

Run `python examples/wgan_gp_train_step.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It
writes wgan_gp_train_step.png to out/.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Models this small do not profit from several threads, and slow down if the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers, ops

NOISE, UNITS = 2, 128
CRITIC_STEPS, BATCH_SIZE = 5, 128
PENALTY_WEIGHT = 0.1
MODES, WIDTH = 8, 0.1


def modes():
    angles = 2 * np.pi * np.arange(MODES) / MODES
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def load_data(count):
    """Points around the modes, each Gaussian with the standard deviation WIDTH."""
    rng = np.random.default_rng(0)
    return (modes()[rng.integers(0, MODES, count)] + rng.normal(0, WIDTH, (count, 2))).astype("float32")


def build_network(inputs, outputs):
    # Smooth activations, because training on the penalty differentiates twice.
    hidden = [layers.Dense(UNITS, "silu") for _ in range(3)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def build_optimizer():
    return keras.optimizers.Adam(1e-3, beta_1=0.0, beta_2=0.9)


def score(y, y_pred):
    """The scalar that is differentiated with respect to a point: the critic's only output."""
    return y_pred[:, 0]


class Networks(keras.Model):
    """Generator and critic, and one step of each."""

    def __init__(self, generator, critic, critic_optimizer):
        super().__init__()
        self.generator, self.critic, self.critic_optimizer = generator, critic, critic_optimizer
        critic_optimizer.build(critic.trainable_variables)
        # Makes them state of this model, which JAX's `fit` passes on from step to step.
        self.critic_optimizer_state = list(critic_optimizer.variables)
        self.seeds = keras.random.SeedGenerator(0)
        self.distance = keras.metrics.Mean(name="distance")
        self.built = True

    def compile(self, optimizer):
        super().compile(optimizer)
        optimizer.build(self.generator.trainable_variables)

    def generate(self, count):
        return self.generator(keras.random.normal((count, NOISE), seed=self.seeds))

    def call(self, points):
        return self.generate(ops.shape(points)[0])

    def train_critic(self, real):
        fake = self.generate(ops.shape(real)[0])
        share = keras.random.uniform((ops.shape(real)[0], 1), seed=self.seeds)
        mixed = share * real + (1.0 - share) * fake
        weights = self.critic.trainable_variables
        with kg.GradientTape() as tape:
            distance = ops.mean(self.critic(real)) - ops.mean(self.critic(fake))
            penalty = kg.regularization.input_gradient_penalty(
                self.critic, mixed, target=score, center=1.0, method="exact"
            )
            loss = PENALTY_WEIGHT * penalty - distance
        self.critic_optimizer.apply(tape.gradient(loss, weights), weights)
        self.distance.update_state(distance)

    def train_generator(self, count):
        weights = self.generator.trainable_variables
        with kg.GradientTape() as tape:
            loss = -ops.mean(self.critic(self.generate(count)))
        self.optimizer.apply(tape.gradient(loss, weights), weights)

    def train_both(self, points):
        parts = ops.split(points, CRITIC_STEPS)
        for real in parts:
            self.train_critic(real)
        self.train_generator(ops.shape(parts[0])[0])
        return {"distance": self.distance.result()}


class WGANGP(Networks):
    """For TensorFlow and torch."""

    def train_step(self, data):
        return self.train_both(keras.utils.unpack_x_y_sample_weight(data)[0])


class StatelessWGANGP(Networks):
    """For JAX."""

    def train_step(self, state, data):
        groups = (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )
        variables = [v for group in groups for v in group]
        values = [x for group in state for x in group]
        # In this scope, reading a variable gives its value in `state`, and assigning to it only notes the new value.
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
            logs = self.train_both(keras.utils.unpack_x_y_sample_weight(data)[0])
        return logs, tuple([scope.get_current_value(v) for v in group] for group in groups)


TRAIN_STEPS = {"tensorflow": WGANGP, "torch": WGANGP, "jax": StatelessWGANGP}


def build():
    model = TRAIN_STEPS[keras.config.backend()]
    gan = model(build_network(NOISE, 2), build_network(2, 1), build_optimizer())
    gan.compile(build_optimizer())
    return gan


def measure(points):
    """The share of points within three standard deviations of a mode, and the share of the rarest mode."""
    distances = np.linalg.norm(points[:, None] - modes(), axis=-1)
    near = distances.min(axis=1) < 3 * WIDTH
    counts = np.bincount(distances.argmin(axis=1)[near], minlength=MODES)
    return float(near.mean()), float(counts.min() / len(points))


def draw(gan, x, points, path):
    from matplotlib import pyplot

    axis = np.linspace(-1.5, 1.5, 101, dtype="float32")
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    scores = gan.critic.predict(grid.reshape(-1, 2), batch_size=4096, verbose=0).reshape(101, 101)
    figure, ax = pyplot.subplots(figsize=(6, 5), layout="constrained")
    filled = ax.contourf(axis, axis, scores, 15, cmap="Greys_r", alpha=0.6)
    figure.colorbar(filled, label="score of the critic")
    ax.plot(*x[:500].T, "o", color="tab:blue", markersize=3, label="real")
    ax.plot(*points[:500].T, "x", color="tab:orange", markersize=4, label="generated")
    ax.set(title="Eight Gaussians, learned by a WGAN-GP", aspect="equal")
    ax.legend(loc="center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    keras.utils.set_random_seed(0)
    x = load_data(20 * CRITIC_STEPS * BATCH_SIZE)
    gan = build()
    noise = np.random.default_rng(1).normal(size=(2000, NOISE)).astype("float32")
    before = measure(gan.generator.predict(noise, batch_size=2000, verbose=0))
    history = gan.fit(x, batch_size=CRITIC_STEPS * BATCH_SIZE, epochs=options.epochs, verbose=0).history
    points = gan.generator.predict(noise, batch_size=2000, verbose=0)
    near, rarest = measure(points)
    steps = [int(optimizer.iterations) for optimizer in (gan.optimizer, gan.critic_optimizer)]
    print(
        f"{type(gan).__name__} on {keras.config.backend()}: {steps[0]} steps of the generator, {steps[1]} of the critic"
    )
    print(f"distance by the critic: {history['distance'][0]:.3f} in the first epoch, {history['distance'][-1]:.3f} now")
    print(f"near a mode: {before[0]:.0%} before training, {near:.0%} now")
    print(f"share of the rarest of {MODES} modes: {rarest:.1%}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(gan, x, points, options.out / "wgan_gp_train_step.png")
    print(f"Picture: wgan_gp_train_step.png in {options.out}/")
    return {"steps": steps, "distance": history["distance"], "before": before, "near": near, "rarest": rarest}


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
