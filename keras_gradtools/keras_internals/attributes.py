"""Checks on import that Keras still has the private attributes that the package uses.

The package reads and sets these attributes directly. If Keras renamed one, setting it would have no effect and raise
no error, so `require` checks that the code of Keras still mentions each of them.
"""

import keras

from keras_gradtools.keras_internals import patches, versions
from keras_gradtools.keras_internals.lookup import find

# Behind the property `trainable` of layers and variables, and behind `dtype_policy` of layers.
TRAINABLE = "_trainable"
DTYPE_POLICY = "_dtype_policy"

_VARIABLE = "keras.src.backend.common.variables:Variable"
_LAYER = "keras.src.layers.layer:Layer"
_LOSS = "keras.src.losses"
_TRAINER = "keras.src.trainers"
_CALLBACK = "keras.src.callbacks.callback:Callback"

# Methods and properties, which can be looked up directly.
_DEFINED = (f"{_LAYER}._flatten_layers", f"{_LAYER}._get_regularization_losses", f"{_LAYER}._clear_losses")
# Attributes of instances and names of global state exist only at run time and cannot be looked up. Instead, each entry
# maps a function of Keras, with every place where it has been, to the names that its code must mention.
_SPELLED = {
    (f"{_VARIABLE}.__init__",): ("_value", "_initializer"),
    (f"{_LAYER}.__init__",): (TRAINABLE, "_loss_ids", "_call_has_training_arg"),
    (f"{_LAYER}.dtype_policy.fget",): (DTYPE_POLICY,),
    (f"{_LAYER}._initialize_tracker",): ("_trainable_variables", "_layers"),
    (f"{_LAYER}._get_call_context",): ("current_call_ctx",),
    ("keras.src.backend.common.stateless_scope:StatelessScope.__init__",): ("losses", "state_mapping"),
    ("keras.src.backend.common.stateless_scope:get_stateless_scope",): ("stateless_scope",),
    (f"{_LOSS}.loss:Loss.__init__",): (DTYPE_POLICY, "_dtype"),
    (f"{_LOSS}.losses:LossFunctionWrapper.__init__",): ("_fn_kwargs",),
    (f"{_CALLBACK}.set_model",): ("_model",),
    (f"{_TRAINER}.compile_utils:CompileLoss.__init__",): ("_user_loss_weights",),
    (f"{_TRAINER}.trainer:BaseTrainer.__init__", f"{_TRAINER}.trainer:Trainer.__init__"): ("_compile_loss",),
    (f"{_TRAINER}.trainer:BaseTrainer.compile", f"{_TRAINER}.trainer:Trainer.compile"): ("_loss_tracker",),
}
_JAX = "keras.src.backend.jax.trainer"
_OF_BACKEND = {"jax": {(f"{_JAX}:Trainer.__init__", f"{_JAX}:JAXTrainer.__init__"): ("_jax_state_synced",)}}


def require():
    """Raises `RuntimeError` if Keras no longer has one of these attributes."""
    for place in _DEFINED:
        find(place)
    for places, names in (_SPELLED | _OF_BACKEND.get(keras.config.backend(), {})).items():
        function = find(*places)
        for name in names:
            if not patches.mentions(function, name):
                raise versions.missing(f"`{name}` in `{function.__module__}.{function.__qualname__}`")
