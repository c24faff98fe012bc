"""Access to Keras' private code: this folder is the only one that imports `keras.src`.

Private names move between versions of Keras, so each is looked up here, in every place where a supported version has
it. A missing name raises an error on import, and an untested version of Keras gives a warning. Both say which versions
were tested and what to do.

| module            | holds                                                                    |
| ----------------- | ------------------------------------------------------------------------ |
| `versions`        | the tested versions of Keras, and the messages about all others          |
| `lookup`          | finding a private name in any of the places where it has been            |
| `patches`         | replacing a function in every module of Keras that uses it               |
| `variables`       | variables, autocasting, deferred initialization                          |
| `scopes`          | stateless scopes, the context of a layer's call, seeds                   |
| `layers`          | layers, operations, masks                                                |
| `losses`          | compiled losses and their reduction to a number                          |
| `logs`            | the function that converts the logs of training loops to floats          |
| `jax_trainer`     | the trainer for JAX                                                      |
| `dtypes`          | the dtypes of results                                                    |
| `backend_modules` | the modules that `keras.ops` calls on the current backend, with hooks     |
| `batches`         | the batches that Keras' training loop on JAX passes to a train function  |
| `attributes`      | the private attributes of Keras objects that the package reads or sets   |

Nothing here imports a framework or `keras_gradtools.backend`, so it can be imported under every Keras backend.
"""

from keras_gradtools.keras_internals import attributes, backend_modules, layers, losses, scopes, variables, versions

__all__ = ["attributes", "backend_modules", "layers", "losses", "scopes", "variables", "versions"]

attributes.require()
# This comes last, because the warning says that every private name was found.
versions.warn_if_untested()
