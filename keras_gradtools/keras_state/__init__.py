"""What this package knows about Keras' state, calls and losses. Nothing here imports a framework or an adapter.

| file             | holds                                                                                      |
| ---------------- | ------------------------------------------------------------------------------------------ |
| `scopes`         | stateless scopes, and which variables are read and assigned in them                        |
| `seeds`          | seed generators                                                                            |
| `layer_state`    | the state of layers besides their weights                                                  |
| `layer_calls`    | the calls of layers while a model runs                                                     |
| `example_losses` | a compiled loss as one value for each example                                              |
| `recording`      | which tapes are recording on a thread, and which variables are read                        |
| `numpy_calls`    | a warning where NumPy is called on a tensor that a tape records                            |
| `precision`      | the precision in which Keras computes by default                                           |
| `framework`      | what these need from the framework                                                         |
"""
