"""The base class of the model wrappers, which train the model inside them."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Nested
from keras_gradtools.keras_state.layer_state import state_variables
from keras_gradtools.training.undone_by_errors import undone_by_errors

_Method = TypeVar("_Method", bound=Callable[..., Any])


def documented_as(method: Any) -> Callable[[_Method], _Method]:
    """`functools.wraps`, which leaves the type of a method as it is: type checkers would not bind it."""
    return functools.wraps(method)  # type: ignore[return-value]


class WrappedModel(keras.Model):
    """Base class of the wrappers. `model` is shared, not copied. `owner` is the name of the public class."""

    _compiler: str | None = None

    def __init__(self, owner: str, model: keras.Model, **kwargs: Any) -> None:
        if not isinstance(model, keras.Model):
            advice = "Put layers into a keras.Sequential with a keras.Input first."
            raise validation.refused(owner, "a keras.Model", "model", model, advice)
        validation.require_built(owner, model)
        kwargs.setdefault("dtype", model.dtype_policy)
        # Without autocasting, gradients are taken with respect to the given inputs, not to a copy in half precision.
        super().__init__(autocast=False, **kwargs)
        self.model = model
        self.built = True

    @property
    def wrapped_model(self) -> keras.Model:
        """The model whose weights are trained."""
        return self.model

    @property
    def output_names(self) -> list[str]:
        # Keras matches losses and metrics that are given by name with these names.
        return self.model.output_names

    @property
    def jit_compile(self) -> bool:
        """Whether the steps of `fit` are compiled: Keras' property, which here also takes the name of a compiler."""
        return keras.Model.jit_compile.fget(self)

    @jit_compile.setter
    def jit_compile(self, value: bool | str | None) -> None:
        self._compiler = None
        if isinstance(value, str) and value != "auto":
            if value not in backend.COMPILERS:
                known = ", ".join(map(repr, ("auto", *backend.COMPILERS)))
                raise validation.refused(type(self).__name__, f"True, False or {known}", "jit_compile", value)
            self._compiler, value = value, True
        keras.Model.jit_compile.fset(self, value)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Does what Keras does for a model that does not override `compile`."""
        given = keras.saving.deserialize_keras_object(config)
        if isinstance(given.get("jit_compile"), str) and given["jit_compile"] not in ("auto", *backend.COMPILERS):
            # It was saved on a backend with another compiler.
            given["jit_compile"] = True
        self.compile(**given)
        self.optimizer.build(self.trainable_variables)

    def _should_torch_compile(self):
        # torch's own compiler cannot differentiate twice.
        return False

    def make_train_function(self, force: bool = False) -> Any:
        return self._compiled_step("train_function", super().make_train_function, force)

    def make_test_function(self, force: bool = False) -> Any:
        return self._compiled_step("test_function", super().make_test_function, force)

    def make_predict_function(self, force: bool = False) -> Any:
        return self._compiled_step("predict_function", super().make_predict_function, force)

    def _compiled_step(self, name, make, force):
        """Makes the function that Keras calls for each step, and compiles it where Keras does not."""
        before = getattr(self, name)
        made = make(force)
        step = getattr(self, name)
        if step is before or not self._compiles():
            return made
        compiled = backend.compiled_step(step, self._compiler)
        if compiled is step:
            return made

        has_warned = False

        def whole(data):
            nonlocal has_warned
            block = self._whole()
            with block, block:
                result = compiled(data)
            if compiled.refusal is not None and not has_warned:
                has_warned = True
                warnings.warn(
                    f"{type(self).__name__} runs its steps eagerly, which is slower: their operations cannot be "
                    f"recorded, because {compiled.refusal}.",
                    stacklevel=3,
                )
            return result

        setattr(self, name, whole)
        return whole

    def _compiles(self):
        return self.jit_compile

    def train_step(self, *args: Any) -> Any:
        block = self._whole()
        with block, block:
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        block = self._whole()
        with block, block:
            return super().test_step(*args)

    def compute_loss(
        self,
        x: Nested = None,
        y: Nested = None,
        y_pred: Nested = None,
        sample_weight: Nested = None,
        training: bool = True,
    ) -> Any:
        self._require_labels(y)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _require_labels(self, y):
        """Raises `ValueError` if the compiled loss has no labels."""
        if y is None and self._compile_loss is not None:
            raise no_labels(type(self).__name__)

    def _whole(self):
        """A block for a step: if the step fails, statistics, seeds and metrics are restored."""
        if not backend.assigns_at_once():
            return contextlib.nullcontext()
        return undone_by_errors([*state_variables(self), *self.metrics_variables])

    def _forward(self, inputs, training):
        return self.model(inputs, training=training)

    @documented_as(keras.Model.save)
    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                f"{type(self).__name__} is saved to a `.keras` file. Received: filepath={str(filepath)!r}. Keras could "
                "not load the wrapper from HDF5. Save its weights with `save_weights`, or the wrapped model, `.model`."
            )
        return super().save(filepath, *args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Exports the wrapped model, as `keras.Model.export` does."""
        return self.model.export(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}


def no_labels(owner):
    """The `ValueError` for data without labels."""
    return ValueError(
        f"{owner} trains on labels. Received: data without labels. Pass `y` to `fit`, `evaluate` or `train_on_batch`."
    )


class StateOfStep(threading.local):
    """Values that the methods of a wrapper share during a step. Every thread has its own, with these initial values.

    Each replica of a distribution strategy runs in a thread.
    """

    def __init__(self, **values):
        self.__dict__.update(values)
