"""A quick check whether the captured values of a function are still the same."""

import operator

_ABSENT = object()


class Guards:
    """Remembers where a function's captured values were found, so that later calls can check them quickly.

    Checking known places takes a fraction of the time of a new walk through the function. The places, and with them
    the function, are held strongly.
    """

    def __init__(self):
        self._found: list = []
        self._values: list = []
        self._lists: list = []
        self._cells: list = []
        self._contents: list = []
        self._functions: list = []
        self._rules: list = []
        self._mappings: list = []
        self._flags: list = []

    def at(self, mapping, name):
        """Remembers the value of a name, or that it is absent."""
        self._found.append((mapping, name, mapping.get(name, _ABSENT)))

    def values(self, mapping, names):
        """Remembers the values of names that exist, which are read together. Equal values count as unchanged."""
        get = operator.itemgetter(*names)
        self._values.append((get, mapping, get(mapping)))

    def flag(self, mapping, name):
        """Remembers the value of a name that exists. Most guards are of this kind, one for each variable of a model."""
        self._mappings.append((mapping, name))
        self._flags.append(mapping[name])

    def layers(self, layers):
        """Remembers the entries of a list of layers."""
        self._lists.append((layers, list(layers)))

    def cell(self, cell):
        self._cells.append((cell, cell.cell_contents))

    def contents(self, container):
        self._contents.append((container, _contents(container)))

    def function(self, fun):
        self._functions.append((fun, fun.__code__, fun.__defaults__, fun.__kwdefaults__))

    def rules(self, compute, x):
        """Remembers what `compute` returns for `x`: a plain value, or a tuple of them."""
        self._rules.append((compute, x, compute(x)))

    def hold(self):
        """Whether everything is unchanged."""
        try:
            for mapping, name, x in self._found:
                if mapping.get(name, _ABSENT) is not x:
                    return False
            for get, mapping, values in self._values:
                if get(mapping) != values:
                    return False
            if [mapping[name] for mapping, name in self._mappings] != self._flags:
                return False
            for layers, found in self._lists:
                if layers != found:
                    return False
            for cell, x in self._cells:
                if cell.cell_contents is not x:
                    return False
            for container, found in self._contents:
                # Not `==`, which compares arrays and variables by their values.
                now = container if type(container) is list else _contents(container)
                if len(now) != len(found) or not all(map(operator.is_, now, found)):
                    return False
            for fun, code, defaults, keywords in self._functions:
                same = fun.__code__ is code and fun.__defaults__ is defaults and fun.__kwdefaults__ is keywords
                if not same:
                    return False
            for compute, layer, result in self._rules:
                if compute(layer) != result:
                    return False
        # A cell was emptied, a dict changed during iteration, a name is gone, or values cannot be compared.
        except (ValueError, RuntimeError, LookupError, TypeError):
            return False
        return True


def _contents(container):
    return (*container, *container.values()) if isinstance(container, dict) else tuple(container)
