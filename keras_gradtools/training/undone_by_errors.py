"""A block for steps that assign weights: an error undoes all of it."""

from keras_gradtools import backend
from keras_gradtools.blocks import Block
from keras_gradtools.keras_state.scopes import in_scope


class undone_by_errors(Block):  # noqa: N801 - said of a block
    """A block that resets `variables` to their former values if it raises. It always resets the framework's modes.

    Code that assigns variables, such as torch's optimizers, also changes modes, and may be interrupted before it has
    changed them back.
    """

    def __init__(self, variables):
        self._variables, self._modes = variables, backend.modes_kept()
        self._before: list = []

    def begin(self):
        self._modes.__enter__()
        if not in_scope():
            # In a stateless scope, assignments are not permanent.
            self._before = [(v, backend.held(v)) for v in self._variables]

    def end(self):
        self._modes.__exit__()

    def __exit__(self, kind=None, *error):
        try:
            if kind is not None and self._is_open:
                for v, value in self._before:
                    v.assign(value)
        finally:
            super().__exit__(kind, *error)
