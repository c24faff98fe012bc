"""The chain of errors that led to an error."""


def of(error):
    """Returns a list of `error` and the errors behind it, in `__cause__` and `__context__`."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
