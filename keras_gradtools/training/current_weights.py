"""The current weights of a model that `fit` trains."""


def sync_weights(*models):
    """Brings the current weights into the variables of the models."""
    # Between training steps on JAX, Keras keeps them outside of the variables.
    for model in models:
        sync = getattr(model, "jax_state_sync", None)
        if sync is not None:
            sync()
