"""Keras' losses: the compiled loss, the scaling under `tf.distribute`, and a hook on the reduction to one number."""

import keras

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

CompileLoss = find("keras.src.trainers.compile_utils:CompileLoss")
# Under a `tf.distribute` strategy, Keras divides the loss of a replica by the number of replicas, so that the sum over
# the replicas is the loss of the batch. The second function undoes that. Elsewhere both return their argument.
scale_loss_for_distribution = find("keras.src.losses.loss:scale_loss_for_distribution")
unscale_loss_for_distribution = find("keras.src.losses.loss:unscale_loss_for_distribution")

# Every loss calls it to reduce its values to one number.
reduction = patches.Hook(find("keras.src.losses.loss"), "reduce_weighted_values", [keras.Loss.__call__])
