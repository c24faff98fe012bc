"""The captured values of a function. A compiled program of the function is valid only while they stay the same."""

import dis
import functools
import operator
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from keras_gradtools.keras_state.layer_state import DTYPE_POLICY, TRAINABLE
from keras_gradtools.transforms.guards import Guards

_LIBRARIES = {"jax", "keras", "numpy", "tensorflow", "torch"}
_INSTALLED = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib")})
_PRIMITIVES = (bool, int, str, bytes, type(None))
_PLAIN = frozenset((*_PRIMITIVES, float))
_CONTAINERS = (tuple, list, dict, set, frozenset)
# A function with more captured objects than this is not cached.
_MOST = 1000
# In a longer list, only layers, functions and containers are compared.
_MOST_ENTRIES = 100


class Identity:
    """Stands for an object in a key. Equal only for the same object, which it holds weakly if possible."""

    __slots__ = ("_hash", "_object")

    def __init__(self, x):
        self._hash = id(x)
        self._object: Callable[[], Any]
        try:
            self._object = weakref.ref(x)
        except TypeError:
            self._object = lambda: x

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine = self._object()
        return isinstance(other, Identity) and mine is not None and mine is other._object()


class CapturedValues(NamedTuple):
    """The captured values of a function: `key`, for comparison, and a label for where each part was found."""

    key: tuple
    labels: tuple

    def changed_since(self, before):
        """The labels whose values differ from those in `before`."""
        now, then = self._by_label(), before._by_label()
        changed = (label for label in now.keys() | then.keys() if now.get(label) != then.get(label))
        return frozenset(label for label in changed if label is not None)

    def _by_label(self):
        found: dict = {}
        for label, value in zip(self.labels, self.key, strict=True):
            found.setdefault(label, []).append(value)
        return found


def captured_values(fun, ignored=frozenset(), reads=frozenset(), guards=None):
    """The captured values of `fun`: what it closes over, its defaults, and the globals and attributes that it names.

    The walk enters the functions and methods among them, except those of installed packages.

    - Layers and models contribute what decides how they compute: their sublayers, the constructor arguments of these,
      which variables are trainable, and the precision.
    - Lists and dicts contribute their contents, other objects the attributes that the functions read.
    - Names that a function assigns itself are skipped, and so are the labels in `ignored`.
    - The values of Keras variables are inputs of a compiled program, and not part of the result.
    - Changes inside an array, inside an object of an installed package, or behind `getattr` are not seen.

    Args:
        fun: The function.
        ignored: Labels to skip.
        reads: Names of attributes of `fun` that the code using it reads.
        guards: The `Guards` that will remember each place at which a value is found.

    Raises:
        TypeError: If `fun` captures too many objects.
    """
    walk = _Walk(ignored, guards or Guards())
    walk.add(fun, (), reads)
    return CapturedValues(tuple(walk.found), tuple(walk.labels))


def attributes_read_by(fun):
    """The names of the attributes that the code of a function reads but does not assign."""
    fun = getattr(fun, "__func__", fun)
    return _names(fun.__code__).reads if isinstance(fun, types.FunctionType) else frozenset()


class _Walk:
    def __init__(self, ignored, guards):
        self._guards = guards
        self.found: list = []
        self.labels: list = []
        self._ignored = ignored
        self._seen: set = set()
        self._layers: set = set()

    def note(self, value, label):
        self.found.append(value)
        self.labels.append(label)

    def _is_ignored(self, label):
        return bool(self._ignored) and label in self._ignored

    def add(self, x, label, reads):
        """Notes `x` and what it contains or captures. `reads` are the attributes that the code using `x` reads."""
        if self._is_ignored(label):
            return
        if isinstance(x, (float, complex)):
            self.note((type(x), repr(x)), label)  # tells 0.0 from -0.0
            return
        if isinstance(x, _PRIMITIVES):
            self.note((type(x), x), label)
            return
        if isinstance(x, (types.FunctionType, types.ModuleType, keras.Layer)):
            self.note(weakref.ref(x), label)  # equal only for the same object, like `Identity`
        elif not isinstance(x, types.MethodType):  # Python makes a new method object for every lookup
            self.note(Identity(x), label)
        visit = (id(x), reads) if reads else id(x)
        if visit in self._seen:
            return
        if len(self._seen) > _MOST:
            raise TypeError("The function captures too many objects.")
        self._seen.add(visit)
        self._add_parts(x, label, reads)

    def _add_parts(self, x, label, reads):
        if isinstance(x, types.FunctionType):
            self._add_function(x, label)
        elif isinstance(x, types.MethodType):
            self.add(x.__self__, (label, "self"), attributes_read_by(x) | {x.__func__.__name__})
            self.add(x.__func__, (label, "method"), reads)
        elif isinstance(x, functools.partial):
            self._guards.contents(x.keywords)
            self._add_all([x.func, *x.args, *x.keywords.values()], label, reads)
        elif isinstance(x, _CONTAINERS):  # also Keras' own classes of the lists and dicts of a layer
            self._add_entries(x, label, reads)
            if type(x) not in _CONTAINERS:
                self._add_object(x, label, reads | {"__call__"})
        elif isinstance(x, keras.Variable):
            self.note(x.trainable, label)
            self._guard_variable(x)
        elif isinstance(x, keras.Layer):
            for layer in x._flatten_layers():
                self._add_layer(layer)
        elif isinstance(x, types.ModuleType):
            if not _is_library(x.__name__, getattr(x, "__file__", None)):
                self._add_attributes(vars(x), (), label, reads)
        elif isinstance(x, type):
            if not _is_library_type(x):
                self._add_attributes({}, x.__mro__, label, reads)
        else:
            self._add_object(x, label, reads | {"__call__"})

    def _add_all(self, parts, label, reads):
        for i, part in enumerate(parts):
            self.add(part, (label, i), reads)

    def _add_function(self, fun, label):
        module = fun.__globals__.get("__name__", "")  # `functools.wraps` does not change this one
        ours = module.split(".")[0] == "keras_gradtools"
        if not ours and _is_library(module, fun.__code__.co_filename):
            return
        names = _names(fun.__code__)
        self._guards.function(fun)
        self.note(Identity(fun.__code__), (label, "code"))  # notebooks replace it when they reload a module
        if fun.__kwdefaults__:
            self._guards.contents(fun.__kwdefaults__)
        if ours and hasattr(fun, "__wrapped__"):
            self.add(fun.__wrapped__, (label, "of"), frozenset())
        self._add_all(
            [*(fun.__defaults__ or ()), *(fun.__kwdefaults__ or {}).values()], (label, "defaults"), names.reads
        )
        # Names that the function assigns itself, such as a counter of its calls, do not invalidate its program.
        for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
            if name in names.stored:
                continue
            if not self._is_ignored((label, name)):
                self._guards.rules(_is_filled, cell)
            if _is_filled(cell):
                if not self._is_ignored((label, name)):
                    self._guards.cell(cell)
                self.add(cell.cell_contents, (label, name), names.reads)
        if not ours:
            for name in names.globals:
                if name in names.stored:
                    continue
                self._guard(fun.__globals__, name, label)
                if name in fun.__globals__:
                    self.add(fun.__globals__[name], (label, name), names.reads)

    def _guard(self, mapping, name, label):
        if not self._is_ignored((label, name)):
            self._guards.at(mapping, name)

    def _add_entries(self, x, label, reads):
        inside = list(x.values() if isinstance(x, dict) else x)
        if isinstance(x, tuple):
            self._add_all(inside, label, reads)
            return
        contents = (label, "contents")
        if contents in self._ignored:
            return
        self._guards.contents(x)
        self.note((tuple(map(_key_of_entry, x)) if isinstance(x, dict) else None, len(x)), contents)
        if len(inside) > _MOST_ENTRIES:
            inside = [p for p in inside if isinstance(p, (keras.Layer, types.FunctionType, *_CONTAINERS))]
        self._add_all(inside, label, reads)

    def _add_layer(self, layer):
        """Notes what decides how a layer computes. There may be hundreds of layers, so this adds plain values directly.

        The values have no labels, because a label whose value has changed is ignored from then on, and a layer that is
        built in the first call must still be compared afterwards.
        """
        if id(layer) in self._layers:
            return
        self._layers.add(id(layer))
        rules, arguments = _rules_of(type(layer))
        values = vars(layer)
        if type(layer) is not keras.layers.InputLayer:
            self._guard_layer(layer, rules, arguments)
        self.found.append(weakref.ref(layer))
        self.found += rules(layer)
        self.found += map(_trainable, layer._trainable_variables)
        for x in map(values.get, arguments):
            self.found.append(x if type(x) in _PLAIN else self._function(x))
        self.labels += [None] * (len(self.found) - len(self.labels))
        if not _is_library_type(type(layer)):
            self._add_object(layer, None, frozenset({"call"}))

    def _guard_layer(self, layer, rules, arguments):
        """Adds as few guards as possible, since they are checked for each layer at each call."""
        values = vars(layer)
        attributes = _attributes_behind_rules(layer)
        if not attributes:
            self._guards.rules(rules, layer)
        found = [name for name in arguments if name in values]
        self._guards.values(values, [*attributes, "_layers", "_trainable_variables", *found])
        if not _is_library_type(type(layer)):
            for name in arguments:
                if name not in values:
                    self._guards.at(values, name)
        self._guards.layers(layer._layers)
        if layer._trainable_variables:
            self._guards.contents(layer._trainable_variables)
        for variable in layer._trainable_variables:
            self._guard_variable(variable)

    def _guard_variable(self, variable):
        if type(variable).trainable is keras.Variable.trainable and TRAINABLE in vars(variable):
            self._guards.flag(vars(variable), TRAINABLE)
        else:
            self._guards.rules(_trainable, variable)

    def _function(self, x):
        if isinstance(x, types.FunctionType):
            if id(x) not in self._seen:
                self.labels += [None] * (len(self.found) - len(self.labels))
                self.add(x, (x.__module__, x.__qualname__), frozenset())
            return id(x)
        return None

    def _add_object(self, x, label, reads):
        """Adds the attributes in `reads`, the methods among them, and the attributes that these methods read."""
        found, methods = _reads_of(type(x), reads)
        self._add_attributes(getattr(x, "__dict__", {}), type(x).__mro__, label, found)
        for name in sorted(found):
            if _is_slot(type(x), name):
                if not self._is_ignored((label, name)):
                    self._guards.rules(functools.partial(_identity_of, name), x)
                self.add(getattr(x, name, None), (label, name), found)
        for name in methods:
            self._guard_classes(type(x).__mro__, name, label)
            for fun in _functions_named(type(x), name):
                self.add(fun, (label, name), found)

    def _add_attributes(self, values, classes, label, names):
        for name in names:
            self._guard(values, name, label)
            if name in values:
                self.add(values[name], (label, name), names)
                continue
            self._guard_classes(classes, name, label)
            owner = next((cls for cls in classes if name in vars(cls)), None)
            if owner is not None and not _is_library_type(owner) and not hasattr(vars(owner)[name], "__get__"):
                self.add(vars(owner)[name], (label, name), names)

    def _guard_classes(self, classes, name, label):
        for cls in classes:
            if not _is_library_type(cls):
                self._guard(vars(cls), name, label)


# Cached facts about the code of each class. No value in it may hold the class strongly.
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _known_of(cls, key, find):
    known = _known.get(cls)
    if known is None:
        known = _known[cls] = {}
    if key not in known:
        known[key] = find()
    return known[key]


def _reads_of(cls, names):
    """`names` and what the methods among them read in turn, without what they assign; and these methods' names."""
    return _known_of(cls, names, lambda: _find_reads(cls, names))


def _find_reads(cls, names):
    found, stored, methods, missing = set(names), set(), [], sorted(names)
    while missing:
        name = missing.pop()
        functions = _functions_named(cls, name)
        if functions:
            methods.append(name)
        for code in (_names(fun.__code__) for fun in functions):
            stored |= code.stored_attributes
            missing += sorted(code.reads - found)
            found |= code.reads
    return frozenset(found - stored), tuple(methods)


def _functions_named(cls, name):
    """The methods and properties of that name in a class and its bases, except those of installed packages."""
    values = [vars(c)[name] for c in cls.__mro__ if name in vars(c) and not _is_library_type(c)]
    functions = [getattr(value, "fget", None) or getattr(value, "__func__", value) for value in values]
    return [fun for fun in functions if isinstance(fun, types.FunctionType)]


def _is_slot(cls, name):
    """Whether a class has a slot of that name, by `__slots__`, and is not one of an installed package."""
    owner = next((c for c in cls.__mro__ if name in vars(c)), None)
    return owner and isinstance(vars(owner)[name], types.MemberDescriptorType) and not _is_library_type(owner)


def _identity_of(name, x):
    return Identity(getattr(x, name, None))


def _rules_of(cls):
    """For a layer class: a getter of the attributes, and the constructor arguments, that decide how it computes."""
    return _known_of(cls, None, lambda: _find_rules(cls))


def _find_rules(cls):
    names = [name for name in ("lora_enabled", "quantization_mode") if hasattr(cls, name)]
    code = getattr(cls.__init__, "__code__", None)
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount] if code else ()
    compared = [a for a in arguments if not a.endswith(("initializer", "regularizer", "constraint")) and a != "name"]
    return operator.attrgetter("trainable", "dtype_policy.name", *names), tuple(compared)


def _attributes_behind_rules(layer):
    """The attributes behind the properties in `_rules_of`, or none if the layer overrides these properties."""
    properties = [name for name in ("trainable", "dtype_policy", "quantization_mode") if hasattr(keras.Layer, name)]
    attributes = TRAINABLE, DTYPE_POLICY
    values = vars(layer)
    known = (
        all(getattr(type(layer), name) is getattr(keras.Layer, name) for name in properties)
        and not hasattr(type(layer), "lora_enabled")
        and not isinstance(values.get(DTYPE_POLICY), keras.dtype_policies.DTypePolicyMap)  # is mutable
        and all(name in values for name in attributes)
    )
    return attributes if known else ()


_trainable = operator.attrgetter("trainable")


class _Names(NamedTuple):
    """The names in a code object, including the functions defined in it.

    Attributes:
        globals: The globals that it looks up.
        stored: The global and nonlocal names that it assigns.
        reads: The attributes that it reads but does not assign.
        stored_attributes: The attributes that it assigns or deletes.
    """

    globals: tuple
    stored: frozenset
    reads: frozenset
    stored_attributes: frozenset


@functools.lru_cache(maxsize=1024)
def _names(code):
    instructions = list(dis.get_instructions(code))

    def of(*operations):
        return {i.argval for i in instructions if i.opname in operations}

    loaded, stored = of("LOAD_GLOBAL", "LOAD_NAME"), of("STORE_GLOBAL", "STORE_DEREF")
    read, assigned = of("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"), of("STORE_ATTR", "DELETE_ATTR")
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names = _names(inner)
            loaded, stored = loaded.union(names.globals), stored | names.stored
            read, assigned = read | names.reads, assigned | names.stored_attributes
    return _Names(tuple(sorted(loaded)), frozenset(stored), frozenset(read - assigned), frozenset(assigned))


def _is_library_type(cls):
    return _is_library_module(cls.__module__)


@functools.lru_cache(maxsize=4096)
def _is_library_module(name):
    return _is_library(name, getattr(sys.modules.get(name), "__file__", None))


@functools.lru_cache(maxsize=4096)
def _is_library(name, file):
    """Whether a module is part of Python or of an installed package, whose contents are assumed not to change."""
    top = name.split(".")[0]
    return top in _LIBRARIES or top in ("builtins", "keras_gradtools") or (file or "").startswith(_INSTALLED)


def _key_of_entry(key):
    return (type(key), key) if isinstance(key, _PRIMITIVES) else Identity(key)


def _is_filled(cell):
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
