"""Keras' layers and operations, and the masks of their outputs."""

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

Layer = find("keras.src.layers.layer:Layer")
Operation = find("keras.src.ops.operation:Operation")
TorchModuleWrapper = find("keras.src.utils.torch_utils:TorchModuleWrapper")
get_keras_mask = find("keras.src.backend.common.masking:get_keras_mask")
set_keras_mask = find("keras.src.backend.common.masking:set_keras_mask")

# What forgets the losses of a layer as an outermost call of it begins.
clear_losses = patches.Hook(Layer, "_clear_losses", [find("keras.src.layers.layer:Layer._get_call_context")])
# What a layer's regularizers make of its weights.
regularization_losses = patches.Hook(Layer, "_get_regularization_losses", [Layer.losses])
