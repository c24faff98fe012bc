"""Stateless scopes that see which variables are read and assigned, and after which the assignments are undone.

Transforms and compiled functions must see the variables that a function reads and assigns, and some must discard the
assignments.
"""

from keras import ops

from keras_gradtools import validation
from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals.layers import clear_losses
from keras_gradtools.keras_internals.layers import regularization_losses as all_regularization_losses
from keras_gradtools.keras_internals.scopes import StatelessScope, get_stateless_scope, global_state
from keras_gradtools.keras_internals.variables import initialize_all_variables
from keras_gradtools.keras_state import framework


class StateScope(StatelessScope):
    """A block that records which variables are read and assigned, and after which the assignments are undone.

    In the block, a variable has the value that was assigned in the block, or else its value in `state_mapping`, or else
    its value outside. Keras' `StatelessScope` has no value for a variable that is not in its mapping, which breaks
    regularizers, and it hides an enclosing scope.
    """

    def __init__(self, state_mapping=()):
        # With `initialize_variables`, Keras would initialize new variables inside a surrounding trace, as tracers.
        super().__init__(list(state_mapping), collect_losses=True, initialize_variables=False)
        self._outside = get_stateless_scope()
        self._read = {}
        self._assigned = {}

    # Like a `Block`, and unlike Keras' scope: it may be left twice, and also after the scope around it was left.

    _is_open = False

    def __enter__(self):
        if self._is_open:
            return self
        try:
            self._is_open = True
            return super().__enter__()
        except BaseException:
            global_state.set_global_attribute("stateless_scope", self._outside)
            self._is_open = False
            raise

    def __exit__(self, *exception):
        if not self._is_open or not self._is_around():
            return
        try:
            super().__exit__(*exception)
            if self._outside is None:
                with framework.eagerly():
                    initialize_all_variables()
        except BaseException:
            global_state.set_global_attribute("stateless_scope", self._outside)
            raise
        finally:
            self._is_open = False

    def _is_around(self):
        scope = get_stateless_scope()
        while scope is not None and scope is not self:
            scope = getattr(scope, "original_scope", None)
        return scope is self

    @property
    def variables_read(self):
        return list(self._read.values())

    @property
    def variables_assigned(self):
        return list(self._assigned.values())

    def add_update(self, update):
        variable, _ = update
        self._assigned[id(variable)] = variable
        super().add_update(update)

    def get_current_value(self, variable):
        self._read.setdefault(id(variable), variable)
        value = super().get_current_value(variable)
        if value is None and self._outside is not None:
            value = self._outside.get_current_value(variable)
        if value is None:
            value = variable._value
        if value is None:
            # Created in the block and initialized after it. Until then Keras uses such a placeholder, too.
            value = variable._initializer(variable.shape, dtype=variable.dtype)
        return value


def is_overridden():
    """Whether an enclosing scope gives some variable another value than its own."""
    scope = get_stateless_scope()
    while scope is not None:
        if scope.state_mapping:
            return True
        scope = getattr(scope, "_outside", None)
    return False


class outside_scopes(Block):  # noqa: N801 - said of a block
    """A block that ignores all enclosing stateless scopes: variables are created and assigned permanently."""

    def __init__(self):
        self._scope = get_stateless_scope()

    def begin(self):
        global_state.set_global_attribute("stateless_scope", None)

    def end(self):
        global_state.set_global_attribute("stateless_scope", self._scope)


def in_scope():
    """Whether a stateless scope is active, so that assignments are not permanent."""
    return get_stateless_scope() is not None


def is_assigned_in_scope(variable):
    """Whether `variable` was assigned inside the innermost scope, and that is a `StateScope`."""
    scope = get_stateless_scope()
    return isinstance(scope, StateScope) and id(variable) in scope._assigned


def read(x):
    """The current value of a variable, which a stateless scope may override. Anything else unchanged."""
    return ops.convert_to_tensor(x.value) if validation.is_variable(x) else x


def _clear_losses_of(clear_all):
    def _clear_losses(self):
        """As in Keras, but inside a `StateScope` it clears only losses that were added in this scope."""
        scope = get_stateless_scope()
        if not isinstance(scope, StateScope):
            return clear_all(self)
        scope.losses[:] = [x for x in scope.losses if id(x) not in self._loss_ids]
        self._loss_ids.clear()
        for layer in self._layers:
            layer._clear_losses()

    return _clear_losses


def _regularization_losses_of(all_losses):
    def _get_regularization_losses(self):
        """As in Keras, but inside a `StateScope` it reads each variable in a way that tapes see."""
        if not isinstance(get_stateless_scope(), StateScope):
            return all_losses(self)
        return [v.regularizer(v) for v in self.trainable_weights if v.regularizer is not None]

    return _get_regularization_losses


clear_losses.replace(_clear_losses_of)
all_regularization_losses.replace(_regularization_losses_of)
