"""What is around a call of Keras: stateless scopes, the outermost layer's call, seeds."""

from keras_gradtools.keras_internals.lookup import find

global_state = find("keras.src.backend.common.global_state")
StatelessScope = find("keras.src.backend.common.stateless_scope:StatelessScope")
get_stateless_scope = find("keras.src.backend.common.stateless_scope:get_stateless_scope")
global_seed_generator = find("keras.src.random.seed_generator:global_seed_generator")
make_default_seed = find("keras.src.random.seed_generator:make_default_seed")


def training_mode():
    """The `training` that was given to the call of a layer around; None for none, and outside of all calls."""
    # From Keras 3.16 on, the context has the attribute only where somebody gave it.
    return getattr(global_state.get_global_attribute("current_call_ctx"), "training", None)
