"""The adapter to the framework that Keras runs on: the only code that imports one.

A backend module offers the kernels below and nothing else. They see flat lists of differentiable
tensors and Keras variables; nesting, defaults and error messages are the business of `tape.py`,
which exists once for all backends.

| kernel                                              | does                                              |
| --------------------------------------------------- | ------------------------------------------------- |
| `Tape(watch_accessed_variables)`                    | a recording, see `recording.Recording`            |
| `pullback(tape, targets, sources, cotangents)`      | reverse mode: `sum_k J_k' u_k` for every source   |
| `constant_pullback(tape, targets, sources, cotangents)`| the same, held constant: no second derivative |
| `pullback_batch(tape, targets, sources, cotangents)`| the same for a stack of cotangents on axis 0      |
| `pushforward(tape, targets, sources, tangents)`     | forward mode: `sum_i J_i v_i` for every target    |
| `pushforward_batch(tape, targets, sources, tangents)`| the same for a stack of tangents on axis 0       |
| `linearize(tape, targets, sources, is_symmetric)`   | `tangents -> pushforward`, its other work done once |
| `map_chunks(fun, count, chunk_size)`                | `fun(numbers)` on the numbers below `count`, a chunk at a time |
| `per_example_gradients(fun, weights, examples, must_vectorize)` | each example's gradient, and tensors besides |
| `jit(fun)`                                          | the framework's compiler, Keras variables as state|
| `compiled(fun)`                                     | compiled by itself where no training step can be  |
| `custom_gradient(fun)`                              | `fun(*args) -> (value, grad_fn)`, twice differentiable |
| `containers()`                                      | the registry of containers that the framework's users have |
| `alias(x)`                                          | another tensor with the value of `x`, recorded    |
| `settled(tensors)`                                  | the tensors, without a graph that only tapes need |
| `tried(fun)`                                        | `fun()` for its errors alone, not computed where that can be |
| `eagerly()`                                         | a block that runs now, whatever is being traced around it |
| `assigns_at_once()`                                 | whether an assignment in a training step is done at once |
| `can_make_variables()`                              | whether variables can be made here: not in a replica |
| `random_state()`                                    | the state of what draws random numbers past Keras' seeds |
| `with_random_state(state)`                          | a block in which it is `state` again              |
| `spread(x)`                                         | examples on the devices that share them           |
| `summed_over_replicas(fun, batch, variable)`        | the sum of `fun(part)` over the replicas' parts |
| `is_shared_by_replicas(batch, variable)`            | whether several replicas have a part of it each   |
| `replica_results(fun, batch, variable)`             | `fun(part)` for each replica's part, in a list    |
| `train_function(model, step)`                       | what `fit` calls, for a `step(batch)` in plain Python |
| `summed_over_processes(totals, count)`              | tensors and a number summed over the processes that train |
| `depends_on_values(error)`                          | whether tracing failed because Python depends on values |
| `modes_kept()`                                      | a block after which the framework's modes are as before |
| `may_compile()`                                     | whether a function called now may be compiled by itself |
| `COMPILES_SECOND_ORDER`                             | whether its compiler takes second derivatives     |
| `LINEARIZES_ONCE`                                   | whether many products are cheaper by one record   |
| `HESSIAN_MODE`                                      | the cheaper way through a gradient, as measured   |

`pullback` and `pushforward` return `None` where nothing that the tape recorded connects a source
with a target. Every cotangent has the shape and dtype of its target, every tangent those of its
source; a variable's gradient has the shape and dtype of the variable. The results are themselves
recorded by whichever other tapes are recording.
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
    """The name of the backend, for people to read: no code goes by it."""
    return keras.backend.backend()


def __getattr__(kernel):
    # Loaded at the first use of a kernel, so that the package itself imports under every Keras backend.
    if kernel.startswith("__"):
        raise AttributeError(kernel)
    found = globals()[kernel] = getattr(_load(), kernel)
    return found


nesting.use_registry(lambda: __getattr__("containers")())
