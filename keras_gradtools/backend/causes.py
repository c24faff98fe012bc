"""What led to an error."""


def of(error):
    """The error, and those that it was raised from or while handling."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
