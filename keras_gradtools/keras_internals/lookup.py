"""Finding an internal of Keras by the places that it has had."""

import importlib
import operator

from keras_gradtools.keras_internals import versions


def find(*places):
    """What is at the first of `places` that this Keras has: `module:name`, `module:class.name` or `module`."""
    for place in places:
        path, _, name = place.partition(":")
        try:
            # Some modules share their names with functions of their package, which a plain `import` would give.
            module = importlib.import_module(path)
            return operator.attrgetter(name)(module) if name else module
        except (ImportError, AttributeError) as error:
            reason = error
    raise versions.missing(" or ".join(f"`{place.replace(':', '.')}`" for place in places)) from reason
