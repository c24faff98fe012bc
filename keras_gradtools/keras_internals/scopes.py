"""The context in which Keras code runs: stateless scopes, the current call of a layer, and seeds."""

from keras_gradtools.keras_internals.lookup import find

global_state = find("keras.src.backend.common.global_state")
StatelessScope = find("keras.src.backend.common.stateless_scope:StatelessScope")
get_stateless_scope = find("keras.src.backend.common.stateless_scope:get_stateless_scope")
global_seed_generator = find("keras.src.random.seed_generator:global_seed_generator")
draw_seed = find("keras.src.random.seed_generator:draw_seed")
make_default_seed = find("keras.src.random.seed_generator:make_default_seed")


def training_mode():
    """The `training` argument of the enclosing layer call. None if it was not given, and outside of layer calls."""
    # Since Keras 3.16, the context has this attribute only if `training` was given.
    return getattr(global_state.get_global_attribute("current_call_ctx"), "training", None)
