"""Replaces a function of Keras in every module of Keras that uses it.

Keras imports some functions by name, and which ones changes between versions. Replacing such a function only in the
module that defines it would have no effect in the modules that imported it, and raise no error.
"""

import inspect
import sys
import types

from keras_gradtools.keras_internals import versions


class Hook:
    """A function of Keras that can be replaced, in its own module and in every module that imported it by name.

    `users` are functions or properties of Keras that must use this name. If one no longer does, a replacement would
    have no effect, so this raises `RuntimeError`. Their code is inspected and not run, because running it would
    initialize the framework's devices.
    """

    def __init__(self, owner, name, users):
        self._owner = owner
        self._name = name
        of = f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__
        if not hasattr(owner, name):
            raise versions.missing(f"`{of}.{name}`")
        for user in users:
            if not mentions(user, name):
                user = getattr(user, "fget", user)
                raise versions.without_effect(f"`{of}.{name}`", f"`{getattr(user, '__qualname__', user)}`")

    def replace(self, make):
        """Replaces the function by `make(original)`."""
        original = getattr(self._owner, self._name)
        replacement = make(original)
        setattr(self._owner, self._name, replacement)
        if not inspect.isclass(self._owner):
            for module in _modules_of_keras():
                if vars(module).get(self._name) is original:
                    setattr(module, self._name, replacement)


def _modules_of_keras():
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "keras" and isinstance(module, types.ModuleType):
            yield module


def mentions(user, name):
    """Whether the code of a function, or of one that it wraps, contains `name`. True if there is no code to inspect."""
    user = user.fget if isinstance(user, property) else user
    codes = list(_codes(user, set()))
    return not codes or any(name in code.co_names or name in code.co_consts for code in codes)


def _codes(value, seen):
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, types.CodeType):
        yield value
        for constant in value.co_consts:
            yield from _codes(constant, seen)
    elif isinstance(value, types.FunctionType):
        yield from _codes(value.__code__, seen)
        # A decorator keeps the wrapped function in a closure cell of the wrapper, even without `functools.wraps`.
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            yield from _codes(content, seen)
    elif isinstance(value, types.MethodType):
        yield from _codes(value.__func__, seen)
