"""The chain of errors that led to an error."""


def of(error):
    """Returns a list of `error` and the errors behind it, in `__cause__` and `__context__`, the latest first.

    Errors that `raise ... from None` hides are in it too. Keras' layers raise in this way: they put an error with their
    arguments in the message in place of the framework's error. If its class takes something else than a message, as
    the classes of JAX do, this can be an error of another class, such as `AttributeError`.
    """
    found, waiting = [], [error]
    while waiting:
        error = waiting.pop()
        if error is not None and all(error is not e for e in found):
            found.append(error)
            waiting += [error.__context__, error.__cause__]
    return found
