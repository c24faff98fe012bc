"""The gradient tape: TensorFlow's `GradientTape` API on every backend."""

import contextlib
import enum
import threading
from collections.abc import Callable
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.annotations import Nested, Tensor
from keras_gradtools.blocks import Block
from keras_gradtools.independence import cross_example_gradients
from keras_gradtools.tape import jacobian_plans, vectors


class GradientTape:
    r"""Records the operations of a block of Keras code so that they can be differentiated.

    Inside its block the tape records every operation on the tensors it watches. Trainable Keras variables are watched
    automatically, anything else after a call of `watch`. The recorded operations can then be differentiated:

    - `gradient` computes $J^\top u$ for cotangents $u$ (reverse mode; the gradient when $u = 1$),
    - `jvp` computes $J v$ for tangents $v$ (forward mode),
    - `jacobian` and `batch_jacobian` compute $J$ itself.

    Anything computed before or after the block, inside `stop_recording`, or before `reset` is a constant. The gradient
    with respect to a variable is taken at the value that was read, even if another value has been assigned since.
    Tapes can be nested for derivatives of any order: a tape records the `gradient` calls of other tapes in its block.

    The tape works eagerly and inside compiled functions (`tf.function`, `jax.jit`, `fit`).

    - On JAX the block is recorded as it runs, and its derivative is compiled from the second run on. A function under
      `jax.jit` may close over watched tensors. A function with a custom derivative (`jax.custom_jvp`,
      `jax.custom_vjp`) may not: differentiating with respect to a tensor that it closes over raises an error.
    - On TensorFlow, from the third time on that blocks with the same operations and shapes are differentiated by
      `jacobian` or `batch_jacobian`, a compiled program computes the Jacobian from what the tape has recorded. Custom
      gradients and calls of a `tf.function` in the block prevent this, and so do `chunk_size` and forward mode.
    - On torch a derivative is part of torch's own graph, so `loss.backward()` differentiates through it. If you will
      not differentiate it again, compute it under `torch.no_grad()`, which saves time and memory.

    Args:
        persistent: Whether derivatives can be computed more than once. A persistent tape also records the derivatives
            that it computes inside its own block.
        watch_accessed_variables: Whether to watch trainable variables as soon as they are read.

    Raises:
        ValueError: If an option is not True or False, or if the tape's block is entered again inside itself.

    Cost:
        `gradient` costs about two evaluations of the block, and `jvp` one to three. A Jacobian costs one vectorized
        reverse-mode pass per element of the target (for `batch_jacobian`, per element of one example's target).

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as outer:
    ...     outer.watch(x)
    ...     with kg.GradientTape() as inner:
    ...         inner.watch(x)
    ...         y = x * x * x
    ...     dy_dx = inner.gradient(y, x)
    >>> float(dy_dx), float(outer.gradient(dy_dx, x))
    (27.0, 18.0)

    Source: TensorFlow's guide "Advanced automatic differentiation"; Griewank & Walther, "Evaluating
    Derivatives" (2008), chapter 3.
    """

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        validation.require_flag("GradientTape", "persistent", persistent)
        validation.require_flag("GradientTape", "watch_accessed_variables", watch_accessed_variables)
        self._persistent = persistent
        self._tape = backend.Tape(watch_accessed_variables)
        self._inside = False
        self._recording = False
        self._used = False
        self._pauses: list = []

    def __enter__(self) -> Self:
        if self._inside:
            raise ValueError(
                "This GradientTape is already recording: a tape cannot be entered inside its own block. "
                "Use a second tape for a second derivative, or leave the block before entering it again."
            )
        if self._used and not self._persistent:
            self._tape.reset()
            self._used = False
        try:
            self._thread = threading.get_ident()
            self._inside = True
            self._tape.__enter__()
            self._recording = True
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: Any) -> None:
        # An interrupt may have stopped the first attempt halfway. `_leave` can safely run again.
        try:
            self._leave(*exception)
        except BaseException:
            self._leave(*exception)
            raise

    def __del__(self) -> None:
        # An interrupt at the very start of `__exit__` leaves the block open until the tape is deleted.
        if getattr(self, "_inside", False) and self._thread == threading.get_ident():
            self._leave()

    def _leave(self, *exception):
        if self._inside:
            self._tape.__exit__(*exception)
        self._inside = self._recording = False

    def watch(self, tensor: Nested) -> None:
        """Watches `tensor`: a tensor, a `keras.Variable`, or a nested structure of them.

        Args:
            tensor: Real floating-point tensors or variables, of any shape. A non-trainable variable is watched
                from its next read on. None and tensors of integers or booleans in the same structure are ignored.

        Raises:
            ValueError: For anything else.
            RuntimeError: Outside the tape's block.
        """
        if not self._inside:
            raise RuntimeError(
                "GradientTape.watch was called outside the tape's block. Call it inside `with tape:`, before "
                "the computation to differentiate."
            )
        watched = vectors.watchable(tensor, "What a GradientTape watches")
        if not self._tape.watches_parts:
            validation.require_dense(watched, "What a GradientTape watches")
        for x in watched:
            if validation.is_variable(x):
                self._tape.watch_variable(x)
            else:
                self._tape.watch(x)

    def watched_variables(self) -> tuple[keras.Variable, ...]:
        """Returns the `keras.Variable`s watched so far as a tuple, in the order in which they were first watched.

        On TensorFlow, raw `tf.Variable`s come after them.
        """
        return tuple(self._tape.watched_variables())

    def stop_recording(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context manager that pauses this tape: operations inside the `with` block are not recorded.

        Other tapes are not paused.

        Raises:
            RuntimeError: If the tape is not recording.
        """
        return _Pause(self)

    def reset(self) -> None:
        """Discards the recorded operations and the list of watched tensors. Recording continues from here.

        Raises:
            RuntimeError: Outside the tape's block.
        """
        if not self._inside:
            raise RuntimeError(
                "GradientTape.reset was called outside the tape's block. Call it inside `with tape:`, or make "
                "a new tape."
            )
        used_up = self._used_up()
        self._tape.reset()
        self._used = False
        if used_up and not self._recording and not self._pauses:
            self._resume()

    def gradient(
        self,
        target: Nested,
        sources: Nested,
        output_gradients: Nested = None,
        unconnected_gradients: str | enum.Enum = "none",
    ) -> Nested:
        r"""Computes the gradient of `target` with respect to `sources`, $\sum_k (\partial y_k / \partial x)^\top u_k$.

        Args:
            target: A tensor $y$, or a nested structure of tensors $y_k$. Without `output_gradients`, the gradient of
                the sum of all their elements is computed.
            sources: Tensors and variables to differentiate with respect to, in any nested structure. It may also
                contain None and tensors of integers or booleans, and so may `target`.
            output_gradients: The cotangents $u_k$, in the structure and shapes of `target`. None stands for ones.
            unconnected_gradients: What to return for a source that `target` does not depend on: None (`"none"`) or
                zeros (`"zero"`). A `tf.UnconnectedGradients` is accepted too.

        Returns:
            The gradients in the structure of `sources`, each with the shape and dtype of its source, and None for
            an entry that is not floating-point.

        Raises:
            ValueError: If a target or source is not a real floating-point tensor or variable, or an option is
                unknown.
            RuntimeError: On the second call on a tape that is not persistent.
        """
        targets, flat_sources, zero = self._require_arguments(target, sources, unconnected_gradients, "gradient")
        cotangents = vectors.like(output_gradients, target, "output_gradients", "`target`", vectors.ones)
        with self._differentiating(targets) as targets:
            gradients = backend.pullback(self._tape, targets, flat_sources, cotangents)
        if zero:
            gradients = [vectors.zeros(s) if g is None else g for g, s in zip(gradients, flat_sources, strict=True)]
        return vectors.pack_as(sources, gradients)

    def jvp(
        self, target: Nested, sources: Nested, tangents: Nested, unconnected_gradients: str | enum.Enum = "none"
    ) -> Nested:
        r"""Computes the derivative of `target` along `tangents`, $\sum_i (\partial y / \partial x_i) v_i$.

        Args:
            target: A tensor or a nested structure of tensors.
            sources: Tensors and variables in any nested structure.
            tangents: The directions $v_i$, in the structure and shapes of `sources`. None stands for zeros.
            unconnected_gradients: What to return for a target that does not depend on any source: None (`"none"`) or
                zeros (`"zero"`).

        Returns:
            The derivatives in the structure of `target`, each with the shape and dtype of its target.

        Raises:
            ValueError, RuntimeError: As `gradient`.
        """
        targets, flat_sources, zero = self._require_arguments(target, sources, unconnected_gradients, "jvp")
        tangents = vectors.like(tangents, sources, "tangents", "`sources`", vectors.zeros)
        with self._differentiating(targets) as targets:
            found = backend.pushforward(self._tape, targets, flat_sources, tangents)
        if zero:
            found = [vectors.zeros(t) if p is None else p for p, t in zip(found, targets, strict=True)]
        return vectors.pack_as(target, found)

    def linearize(
        self, target: Nested, sources: Nested, unconnected_gradients: str | enum.Enum = "none"
    ) -> Callable[[Nested], Nested]:
        r"""Returns the linear map $v \mapsto \sum_i (\partial y / \partial x_i) v_i$ as a function.

        The work that does not depend on $v$ is done once, so many tangents cost less than with `jvp`.

        Args:
            target: A tensor or a nested structure of tensors.
            sources: Tensors and variables in any nested structure.
            unconnected_gradients: As for `jvp`.

        Returns:
            A function that takes tangents in the structure and shapes of `sources`, and returns what `jvp` returns.
            It can be called any number of times, also if the tape is not persistent, and keeps the recorded operations
            in memory.

        Raises:
            ValueError, RuntimeError: As `gradient`.
        """
        targets, flat_sources, zero = self._require_arguments(target, sources, unconnected_gradients, "linearize")
        with self._differentiating(targets) as targets:
            linear = backend.linearize(self._tape, targets, flat_sources)

        def jvp(tangents):
            found = linear(vectors.like(tangents, sources, "tangents", "`sources`", vectors.zeros))
            if zero:
                found = [vectors.zeros(t) if p is None else p for p, t in zip(found, targets, strict=True)]
            return vectors.pack_as(target, found)

        return jvp

    def jacobian(
        self,
        target: Tensor,
        sources: Nested,
        unconnected_gradients: str | enum.Enum = "none",
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
        chunk_size: int | None = None,
        mode: Literal["auto", "forward", "reverse"] = "reverse",
    ) -> Nested:
        r"""Computes the Jacobian of `target` with respect to `sources`, $J_{k i} = \partial y_k / \partial x_i$.

        Args:
            target: One tensor of any shape.
            sources: Tensors and variables in any nested structure.
            unconnected_gradients: As for `gradient`.
            parallel_iterations: TensorFlow's name for `chunk_size`.
            experimental_use_pfor: Whether to vectorize over directions. If False, they are computed one at a time,
                whatever the `chunk_size`.
            chunk_size: Number of directions to compute at once. By default all. Smaller chunks need less memory. The
                result is the same.
            mode: `"reverse"` (one cotangent per element of `target`), `"forward"` (one tangent per element of
                `sources`), or `"auto"` (whichever needs fewer directions).

        Returns:
            The Jacobians in the structure of `sources`, each of shape `target.shape + source.shape`.

        Raises:
            ValueError, RuntimeError: As `gradient`.
        """
        target = self._require_tensor(target, "jacobian")
        chunk_size = jacobian_plans.rows_at_once(
            "GradientTape.jacobian", chunk_size, parallel_iterations, experimental_use_pfor
        )
        _, flat_sources, zero = self._require_arguments(target, sources, unconnected_gradients, "jacobian")
        jacobian_plans.require_mode("GradientTape.jacobian", mode)
        with self._differentiating([target]) as targets:
            (blocks,) = jacobian_plans.jacobians(self._tape, targets, flat_sources, mode, chunk_size, zero)
        return vectors.pack_as(sources, blocks)

    def batch_jacobian(
        self,
        target: Tensor,
        source: Nested,
        unconnected_gradients: str | enum.Enum = "none",
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
        chunk_size: int | None = None,
        mode: Literal["auto", "forward", "reverse"] = "reverse",
        check_independence: bool = False,
    ) -> Nested:
        r"""Computes the Jacobian of each example, $J_{b k i} = \partial y_{b k} / \partial x_{b i}$.

        Correct only if the examples are independent. This is not checked unless `check_independence=True`. In reverse
        mode it costs one backward pass of the whole batch per element of one example's target.

        Args:
            target: One tensor of shape `(batch, ...)`.
            source: Tensors and variables of shape `(batch, ...)`, in any nested structure.
            unconnected_gradients: Checked as for `gradient`, but has no effect. A source that `target` does not depend
                on gets zeros, as in TensorFlow.
            parallel_iterations: TensorFlow's name for `chunk_size`.
            experimental_use_pfor: As for `jacobian`.
            chunk_size: Number of directions to compute at once, each for the whole batch. By default all. Smaller
                chunks need less memory. The result is the same.
            mode: As for `jacobian`, counting the elements of one example.
            check_independence: Whether to check first that no example's target depends on another example's source,
                and to raise an error otherwise. The check costs six gradients and is not available inside compiled
                functions. To find the layer that mixes the examples, use `kg.diagnostics.batch_independence`.

        Returns:
            The Jacobians in the structure of `source`, each of shape
            `(batch, *target.shape[1:], *source.shape[1:])`.

        Raises:
            ValueError: If the batch sizes differ or a rank is below 2, if `check_independence` finds that the
                examples depend on one another, and as `gradient`.
            RuntimeError: As `gradient`.
        """
        validation.require_flag("batch_jacobian", "check_independence", check_independence)
        target = self._require_tensor(target, "batch_jacobian")
        chunk_size = jacobian_plans.rows_at_once(
            "GradientTape.batch_jacobian", chunk_size, parallel_iterations, experimental_use_pfor
        )
        _, flat_sources, _ = self._require_arguments(target, source, unconnected_gradients, "batch_jacobian")
        jacobian_plans.require_mode("GradientTape.batch_jacobian", mode)
        for s in flat_sources:
            jacobian_plans.require_same_batch("GradientTape.batch_jacobian", target, s)
        with self._differentiating([target]) as targets:
            if check_independence:
                cross_example_gradients.require_independence(
                    "GradientTape.batch_jacobian", self._tape, targets, flat_sources
                )
            (blocks,) = jacobian_plans.jacobians(
                self._tape, targets, flat_sources, mode, chunk_size, True, batch_axes=1
            )
        return vectors.pack_as(source, blocks)

    def _used_up(self):
        return self._used and not self._persistent

    def _pause(self):
        self._tape.pause()
        self._recording = False

    def _resume(self):
        self._tape.resume()
        self._recording = True

    @contextlib.contextmanager
    def _differentiating(self, targets):
        """The context in which derivatives are computed. Yields the targets as tensors."""
        if any(validation.is_variable(t) for t in targets):
            # A watching tape sees a variable only when it is read.
            with contextlib.nullcontext() if self._inside else self:
                targets = [ops.convert_to_tensor(t) for t in targets]
        if self._recording and not self._persistent:
            self._pause()
        self._used = True
        yield targets
        if not self._persistent:
            self._tape.release()

    def _require_arguments(self, target, sources, unconnected_gradients, method):
        if self._used_up():
            raise RuntimeError(
                "This GradientTape has already been used: a tape computes derivatives once, unless it was made "
                "with `kg.GradientTape(persistent=True)`."
            )
        unconnected = unconnected_gradients
        if isinstance(unconnected, enum.Enum):
            unconnected = unconnected.value  # `tf.UnconnectedGradients`
        validation.require_choice(f"GradientTape.{method}", "unconnected_gradients", unconnected, ("none", "zero"))
        targets = vectors.watchable(target, f"The target of GradientTape.{method}")
        flat_sources = vectors.watchable(sources, f"A source of GradientTape.{method}")
        validation.require_dense(flat_sources, f"A source of GradientTape.{method}")
        return targets, flat_sources, unconnected == "zero"

    def _require_tensor(self, target, method):
        if nesting.is_nested(target):
            raise ValueError(
                f"GradientTape.{method} takes one target tensor. Received: a {type(target).__name__}. Make the "
                "tape persistent and call the method once for each target, or concatenate the targets."
            )
        return target


class _Pause(Block):
    """The context manager of `stop_recording`."""

    def __init__(self, tape):
        self._tape = tape

    def begin(self):
        if not self._tape._recording:
            raise RuntimeError(
                "GradientTape.stop_recording was called on a tape that is not recording. Call it inside the "
                "tape's block, and before the derivative if the tape is not persistent."
            )
        self._tape._pauses.append(self)
        self._tape._pause()

    def end(self):
        tape = self._tape
        if self in tape._pauses:
            if tape._inside and not tape._recording and not tape._used_up():
                tape._resume()
            tape._pauses.remove(self)
