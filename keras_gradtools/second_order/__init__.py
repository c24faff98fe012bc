"""Second-order training: the Newton step, its optimizers, the wrapper for `fit` and the callback."""
