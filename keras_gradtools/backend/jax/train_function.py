"""What `fit` calls on JAX."""

from keras_gradtools.keras_internals import batches


def train_function(model, step):
    """Copies Keras' state into the variables before a step, and out of them afterwards.

    Between steps, Keras on JAX holds the state in a tuple of arrays and leaves the variables empty, but `step` reads
    and assigns variables.
    """

    def function(state, iterator):
        stores = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        for variables, values in zip(stores, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                if variable._value is not value:
                    variable.assign(value)
        model._jax_state_synced = True
        for batch in batches.of_execution(iterator, model.steps_per_execution):
            logs = step(batch)
        return logs, tuple([v.value for v in variables] for variables in stores)

    return function
