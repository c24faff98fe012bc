"""Keras' losses: how they are compiled, and how their values become one number."""

import keras

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

CompileLoss = find("keras.src.trainers.compile_utils:CompileLoss")
# By what a loss is to be multiplied so that the sum over the replicas of a `tf.distribute` strategy is the loss of the
# batch, and back. Elsewhere both return what they are given.
scale_loss_for_distribution = find("keras.src.losses.loss:scale_loss_for_distribution")
unscale_loss_for_distribution = find("keras.src.losses.loss:unscale_loss_for_distribution")

# By which the values of every loss become one number.
reduction = patches.Hook(find("keras.src.losses.loss"), "reduce_weighted_values", [keras.Loss.__call__])
