"""Keras' trainer for JAX. Import this file on the JAX backend only."""

from keras_gradtools.keras_internals.lookup import find

_HOME = "keras.src.backend.jax.trainer"

module = find(_HOME)
Trainer = find(f"{_HOME}:JAXTrainer", f"{_HOME}:Trainer")
