"""The modules that `keras.ops` calls on the current backend, and hooks for the functions in them that we replace.

The backends of this package replace functions whose derivatives are wrong or missing. `hooks` lists these functions for
each framework, and checks that Keras still calls them under these names.
"""

import keras

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find


def module(name):
    """Keras' module `core`, `image`, `linalg`, `nn`, `numpy`, `random` or `rnn` for the current backend."""
    home = f"keras.src.backend.{keras.config.backend()}"
    # Since Keras 3.16, all but `random` and `rnn` are in the folder `ops`.
    return find(f"{home}.ops.{name}", f"{home}.{name}")


def function(where, name):
    """The function `name` of one of these modules."""
    return find(f"{module(where).__name__}:{name}")


def _of_operations(*names):
    """Maps each name to the public operation that calls the function of this name."""
    return {name: f"keras.ops:{name}" for name in names}


# Framework, module and name of each replaced function, with its caller: a public operation, or a function of the same
# module.
_USERS: dict = {
    "tensorflow": {
        "nn": {**_of_operations("celu", "ctc_loss", "silu"), "_compute_moments": "moments"},
        "numpy": _of_operations("i0", "ldexp", "logaddexp", "logaddexp2", "nextafter", "sinc"),
    },
    "jax": {
        "core": _of_operations("stop_gradient"),
        "numpy": _of_operations(
            "broadcast_to",
            "concatenate",
            "expand_dims",
            "i0",
            "ldexp",
            "moveaxis",
            "nextafter",
            "ravel",
            "reshape",
            "sinc",
            "squeeze",
            "swapaxes",
            "transpose",
        ),
    },
    "torch": {
        "core": _of_operations("grad"),
        "nn": {**_of_operations("dot_product_attention"), "_maybe_convert_to_channels_last": "conv"},
        "numpy": _of_operations("floor_divide", "i0", "ldexp", "nextafter", "sinc"),
        "linalg": {
            "cholesky_inverse": "keras.src.ops.linalg:_cholesky_inverse",
            "det": "keras.src.ops.linalg:_det",
        },
        "image": {"affine_transform": "keras.ops.image:affine_transform"},
        "rnn": {"cudnn_ok": "lstm"},
        "random": {"torch_seed_generator": "normal"},
    },
}
# Functions that some supported versions of Keras do not have. For example, `keras.ops.grad` exists since Keras 3.16.
_OPTIONAL = {
    "_maybe_convert_to_channels_last",
    "cholesky_inverse",
    "grad",
    "i0",
    "ldexp",
    "logaddexp2",
    "nextafter",
    "sinc",
}


def _hooks():
    found: dict = {}
    for where, users in _USERS.get(keras.config.backend(), {}).items():
        owner, found[where] = module(where), {}
        for name, user in users.items():
            if name not in _OPTIONAL or hasattr(owner, name):
                user = find(user if ":" in user else f"{owner.__name__}:{user}")
                found[where][name] = patches.Hook(owner, name, [user])
    return found


# `hooks[module][name]` is a `patches.Hook`.
hooks = _hooks()
