"""Keras' base classes of layers and operations, the masks of their outputs, and two hooks on layers."""

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

Layer = find("keras.src.layers.layer:Layer")
Operation = find("keras.src.ops.operation:Operation")
TorchModuleWrapper = find("keras.src.utils.torch_utils:TorchModuleWrapper")
get_keras_mask = find("keras.src.backend.common.masking:get_keras_mask")
set_keras_mask = find("keras.src.backend.common.masking:set_keras_mask")

# Keras calls it to clear a layer's losses when an outermost call begins.
clear_losses = patches.Hook(Layer, "_clear_losses", [find("keras.src.layers.layer:Layer._get_call_context")])
# Returns the regularization losses of a layer's weights.
regularization_losses = patches.Hook(Layer, "_get_regularization_losses", [Layer.losses])
