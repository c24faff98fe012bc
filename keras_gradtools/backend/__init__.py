"""The interface to TensorFlow, JAX and torch: this folder is the only one that imports a framework.

Each framework has one module that offers the kernels below and nothing else. Kernels take flat lists of differentiable
tensors and Keras variables. Nested structures, defaults and checks of arguments are handled once for all backends,
in `tape/` and above.

| kernel                                                          | does                                               |
| --------------------------------------------------------------- | -------------------------------------------------- |
| `Tape(watch_accessed_variables)`                                | a tape, see `recording.Recording`                  |
| `pullback(tape, targets, sources, cotangents)`                  | reverse mode: `sum_k J_k' u_k` for every source    |
| `constant_pullback(tape, targets, sources, cotangents)`         | the same, as constants                             |
| `pullback_batch(tape, targets, sources, cotangents)`            | the same for a stack of cotangents along axis 0    |
| `pushforward(tape, targets, sources, tangents)`                 | forward mode: `sum_i J_i v_i` for every target     |
| `pushforward_batch(tape, targets, sources, tangents)`           | the same for a stack of tangents along axis 0      |
| `linearize(tape, targets, sources, is_symmetric)`               | `tangents -> pushforward`, for many tangents       |
| `map_chunks(fun, count, chunk_size)`                            | `fun(indices)` for `0 ... count - 1` in chunks     |
| `per_example_gradients(fun, weights, examples, must_vectorize)` | per-example gradients and auxiliary tensors        |
| `jit(fun)`                                                      | `fun` compiled (not on torch), variables as state  |
| `compiled(fun)`                                                 | `fun`, compiled only on torch, see below           |
| `custom_gradient(fun)`                                          | a function with its own gradient, see below        |
| `containers()`                                                  | the containers registered with the framework       |
| `alias(x)`                                                      | a new tensor equal to `x`, as a recorded operation |
| `settled(tensors)`                                              | tensors, detached if only tapes need their graph   |
| `tried(fun)`                                                    | runs, or only traces, `fun()` to see its errors    |
| `eagerly()`                                                     | a block that runs eagerly, even inside a trace     |
| `assigns_at_once()`                                             | whether a training step assigns immediately        |
| `can_make_variables()`                                          | whether variables can be created (not in replicas) |
| `random_state()`                                                | the state of generators other than Keras' seeds    |
| `with_random_state(state)`                                      | a block in which those generators have this state  |
| `spread(x)`                                                     | `x`, distributed over the devices of a data layout |
| `summed_over_replicas(fun, batch, variable)`                    | the sum of `fun(part)` over the replicas' parts    |
| `is_shared_by_replicas(batch, variable)`                        | whether several replicas share the batch           |
| `replica_results(fun, batch, variable)`                         | the list of `fun(part)` for each replica's part    |
| `train_function(model, step)`                                   | what `fit` calls, made from a Python `step(batch)` |
| `summed_over_processes(totals, count)`                          | tensors and a count, summed over all processes     |
| `depends_on_values(error)`                                      | whether a trace failed because Python needs values |
| `modes_kept()`                                                  | a block that restores the framework's modes        |
| `may_compile()`                                                 | whether a function called here may be compiled     |
| `COMPILES_SECOND_ORDER`                                         | whether compiled functions have second derivatives |
| `LINEARIZES_ONCE`                                               | whether `linearize` beats a compiled product       |
| `HESSIAN_MODE`                                                  | the faster mode for Hessians, as measured          |

`pullback` returns `None` for a source, and `pushforward` for a target, that no recorded operation connects with the
other side. Every cotangent has the shape and dtype of its target, every tangent those of its source, and the gradient
of a variable those of the variable. All other tapes that are recording record the computation of the results.

`linearize` does the work that does not depend on the tangents only once. With `is_symmetric`, it may use a vjp in place
of a jvp. `custom_gradient` takes `fun(*args) -> (value, grad_fn)`, and its gradients can be differentiated again.
`compiled` is only needed on torch, because Keras compiles the whole training step on TensorFlow and JAX.
"""

import importlib

import keras

from keras_gradtools import nesting

_MODULES = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}


def _load():
    name = keras.backend.backend()
    if name not in _MODULES:
        raise RuntimeError(
            "keras_gradtools needs a Keras backend that can differentiate: 'tensorflow', 'jax' or 'torch'. "
            f"Received: the backend {name!r}, which has no gradients. Set the environment variable "
            "KERAS_BACKEND to one of the three before Keras is imported."
        )
    return importlib.import_module(f"keras_gradtools.backend.{_MODULES[name]}")


def name():
    """The name of the backend, for messages only. No code may branch on it."""
    return keras.backend.backend()


def __getattr__(kernel):
    # Loaded at the first use of a kernel, so that the package can be imported under every Keras backend.
    if kernel.startswith("__"):
        raise AttributeError(kernel)
    found = globals()[kernel] = getattr(_load(), kernel)
    return found


nesting.use_registry(lambda: __getattr__("containers")())
