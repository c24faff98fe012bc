"""Finds a private name of Keras in any of the places where supported versions have it."""

import importlib
import operator

from keras_gradtools.keras_internals import versions


def find(*places):
    """Returns the object at the first of `places` that the installed Keras has.

    A place is `module:name`, `module:class.name` or `module`. Raises `RuntimeError` if none of them exists.
    """
    for place in places:
        path, _, name = place.partition(":")
        try:
            # If a package has a function with the name of one of its modules, a plain `import` would give the function.
            module = importlib.import_module(path)
            return operator.attrgetter(name)(module) if name else module
        except (ImportError, AttributeError) as error:
            reason = error
    raise versions.missing(" or ".join(f"`{place.replace(':', '.')}`" for place in places)) from reason
