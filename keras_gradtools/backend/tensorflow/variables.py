"""Finds the Keras variable that holds a `tf.Variable`.

TensorFlow's tape reports the `tf.Variable`s that it watches, and these have no reference to their Keras variables. So
each Keras variable notes itself on its `tf.Variable` when it is read.
"""

import weakref

_OWNER = "_keras_gradtools_owner"


def meet(variable):
    """Notes on the `tf.Variable` of the Keras variable `variable` that it belongs to this one."""
    value = variable._value
    if value is not None and not hasattr(value, _OWNER):
        setattr(value, _OWNER, weakref.ref(variable))


def owners(variables):
    """The Keras variable for each `tf.Variable`, or this itself if there is none. Only those of floating point."""
    found = []
    for variable in variables:
        # Under a distribution strategy, a tape sees the component on one device.
        container = getattr(variable, "_distributed_container", lambda: None)()
        variable = variable if container is None else container
        if variable.dtype.is_floating:
            owner = getattr(variable, _OWNER, lambda: None)()
            found.append(variable if owner is None else owner)
    return found
