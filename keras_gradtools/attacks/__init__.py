"""Adversarial attacks, and robustness metrics based on them."""

from keras_gradtools.attacks.fgsm import FGSM, fgsm
from keras_gradtools.attacks.gaussian_noise import GaussianNoise
from keras_gradtools.attacks.pgd import PGD, pgd
from keras_gradtools.attacks.robustness_metrics import robustness_metrics
from keras_gradtools.attacks.robustness_report import RobustnessReport, robustness_report

__all__ = [
    "FGSM",
    "PGD",
    "GaussianNoise",
    "RobustnessReport",
    "fgsm",
    "pgd",
    "robustness_metrics",
    "robustness_report",
]


def __dir__() -> list[str]:
    return __all__
