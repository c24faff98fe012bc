"""Attacks on models, and what they tell about robustness."""

from keras_gradtools.attacks.fgsm import FGSM, fgsm
from keras_gradtools.attacks.gaussian_noise import GaussianNoise
from keras_gradtools.attacks.pgd import PGD, pgd
from keras_gradtools.attacks.robustness_metrics import robustness_metrics

__all__ = ["FGSM", "PGD", "GaussianNoise", "fgsm", "pgd", "robustness_metrics"]
