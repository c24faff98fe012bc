"""Keras' layers and operations, and the masks of their outputs."""

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

Layer = find("keras.src.layers.layer:Layer")
Operation = find("keras.src.ops.operation:Operation")
TorchModuleWrapper = find("keras.src.utils.torch_utils:TorchModuleWrapper")
get_keras_mask = find("keras.src.backend.common.masking:get_keras_mask")
set_keras_mask = find("keras.src.backend.common.masking:set_keras_mask")


def replace_clear_losses(make):
    """Puts `make(original)` in the place of what forgets the losses of a layer as an outermost call of it begins."""
    patches.replace(Layer, "_clear_losses", make, [find("keras.src.layers.layer:Layer._get_call_context")])


def replace_regularization_losses(make):
    """Puts `make(original)` in the place of what a layer's regularizers make of its weights."""
    patches.replace(Layer, "_get_regularization_losses", make, [Layer.losses])
