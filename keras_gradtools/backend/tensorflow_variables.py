"""To which Keras variable a variable of TensorFlow's belongs, of which TensorFlow itself knows nothing."""

import weakref

_OWNER = "_keras_gradtools_owner"


def meet(variable):
    """Notes on the variable of TensorFlow's that `variable`, of Keras, is what holds it."""
    value = variable._value
    if value is not None and not hasattr(value, _OWNER):
        setattr(value, _OWNER, weakref.ref(variable))


def owners(variables):
    """The Keras variable that holds each of these, or itself where none does; only what is floating-point."""
    found = []
    for variable in variables:
        # Of a distribution strategy, a tape sees the part on one device.
        container = getattr(variable, "_distributed_container", lambda: None)()
        variable = variable if container is None else container
        if variable.dtype.is_floating:
            owner = getattr(variable, _OWNER, lambda: None)()
            found.append(variable if owner is None else owner)
    return found
