"""What Keras does not promise to keep: the only code that imports `keras.src`.

Everything is looked up here, at each place that a supported version of Keras has it at. What is missing is one
error, and a Keras newer than the tested ones is one warning; both say what was tested and what to do.

| module            | holds                                                                    |
| ----------------- | ------------------------------------------------------------------------ |
| `versions`        | which versions of Keras were tested, and the words about all others      |
| `lookup`          | finding an internal by the places that it has had                        |
| `patches`         | replacing a function wherever Keras looks it up, and noticing if it does not |
| `variables`       | variables, autocasting, what was made and is not yet initialized         |
| `scopes`          | stateless scopes, the call around, seeds                                 |
| `layers`          | layers, operations, masks                                                |
| `losses`          | compiled losses and how they are reduced                                 |
| `jax_trainer`     | the trainer for JAX                                                      |
| `backend_modules` | the modules that Keras' operations call on the current backend           |
| `batches`         | what Keras' training loop on JAX hands to a train function               |
| `attributes`      | the private attributes of Keras' objects that the package reads or sets  |

It imports no framework and no backend of ours, so that it can be read under every Keras backend.
"""

from keras_gradtools.keras_internals import attributes, backend_modules, layers, losses, scopes, variables, versions

__all__ = ["attributes", "backend_modules", "layers", "losses", "scopes", "variables", "versions"]

attributes.require()
# Only now, when everything has been found.
versions.warn_if_untested()
