"""A call of every plot, on a given Axes or on the current one."""

import numpy as np

import keras_gradtools as kg

RNG = np.random.default_rng(0)
EPOCHS = 8


def spectra(count):
    return [np.sort(np.exp(RNG.normal(size=(4, count))), axis=1)[:, ::-1] for _ in range(EPOCHS)]


def report():
    attack = RNG.uniform(0.05, 0.4, 60)
    right = np.arange(60) > 5
    distances = {
        "first_order": attack * RNG.uniform(0.9, 1.3, 60) * right,
        "lipschitz_bound": attack * RNG.uniform(0.2, 0.4, 60) * right,
        "curvature_bound": attack * RNG.uniform(0.5, 0.8, 60) * right,
        "attack": attack * right,
    }
    return kg.attacks.RobustnessReport(right, attack, attack, **distances, lipschitz=1.0, curvature=1.0, norm="inf")


def density():
    values = np.concatenate([np.zeros(50), np.linspace(0.5, 3.0, 14)])
    return kg.curvature.spectral_density(np.diag(values), probes=4, steps=20)


def surface():
    line = np.linspace(-1, 1, 21)
    return kg.curvature.LossSurface(line, line, 3 * line[:, None] ** 2 + line**2, np.array([6.0, 2.0]))


def eigenvalues():
    names = ("hessian_max_eigenvalue", "hessian_min_eigenvalue")
    return dict(zip(names, (np.linspace(1, 9, EPOCHS), np.linspace(-2, -0.1, EPOCHS)), strict=True))


def jacobian(batch=5):
    return np.einsum("bc,oi->boci", np.eye(batch), RNG.normal(size=(2, 3)))


def blocks():
    return {"kernel": {"kernel": np.eye(6).reshape(3, 2, 3, 2), "bias": np.ones((3, 2, 2))},
            "bias": {"kernel": np.ones((2, 3, 2)), "bias": -np.eye(2)}}  # fmt: skip


def flow(count):
    layers = ("first", "second", "third", "out")
    return {name: 10.0 ** RNG.normal(i, 0.2, size=count) for i, name in enumerate(layers)}


def sweep():
    clean, attacked = np.array([[0.98, 0.979, 0.95], [0.4, 0.7, 0.8]])
    masked = np.array([False, False, True])
    options = {"max_drop": 0.01, "epsilon": 0.1, "norm": "inf", "examples": 100}
    weights = np.array([0.0, 0.1, 1.0])
    return kg.regularization.PenaltyWeightSweep(weights, clean[:, None], attacked[:, None], masked, **options)


# Each takes `ax`, which may be None. The number says how many Axes the plot has.
PLOTS = {
    "imshow_zero_center": (1, lambda ax: kg.plots.imshow_zero_center(RNG.normal(size=(8, 10)), ax)),
    "plot_as_patches": (1, lambda ax: kg.plots.plot_as_patches(jacobian(), ax)),
    "plot_eigenvalue_history": (1, lambda ax: kg.plots.plot_eigenvalue_history(eigenvalues(), ax)),
    "plot_gradient_flow": (1, lambda ax: kg.plots.plot_gradient_flow(flow(EPOCHS), ax)),
    "plot_gradient_flow, few": (1, lambda ax: kg.plots.plot_gradient_flow(flow(3), ax)),
    "plot_hessian": (1, lambda ax: kg.plots.plot_hessian(blocks(), ax)),
    "plot_jacobians": (2, lambda ax: kg.plots.plot_jacobians({"alone": jacobian(), "mixed": jacobian() - 1}, ax)),
    "plot_loss_surface": (1, lambda ax: kg.plots.plot_loss_surface(surface(), ax)),
    "plot_penalty_weight_sweep": (1, lambda ax: kg.plots.plot_penalty_weight_sweep(sweep(), ax)),
    "plot_robustness": (2, lambda ax: kg.plots.plot_robustness(report(), ax)),
    "plot_singular_values": (1, lambda ax: kg.plots.plot_singular_values(spectra(3), ax)),
    "plot_singular_values, many": (1, lambda ax: kg.plots.plot_singular_values(spectra(12), ax)),
    "plot_spectral_density": (1, lambda ax: kg.plots.plot_spectral_density(density(), ax)),
}
