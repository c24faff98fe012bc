"""The gradient tape: TensorFlow's contract, on every backend."""

import contextlib
import enum
import threading

from keras import ops

from keras_gradtools import backend, independence, jacobians, nesting, validation, vectors
from keras_gradtools.backend.blocks import Block


class GradientTape:
    r"""Records what a block of Keras code computes, so that it can be differentiated.

    Inside its block the tape follows every operation on what it watches: trainable Keras variables by
    themselves, anything else after `watch`. Afterwards

    - `gradient` pulls cotangents $u$ back, $J^\top u$ (reverse mode; the gradient when $u = 1$),
    - `jvp` pushes tangents $v$ forward, $J v$ (forward mode),
    - `jacobian` and `batch_jacobian` give $J$ itself.

    What was computed before the block, inside `stop_recording`, before `reset`, or after the block is a
    constant. A gradient by a variable refers to the value that was read, whatever was assigned to it since.
    Tapes nest, to any order of derivative: a `gradient` taken inside another tape's block is recorded by it.

    The tape works eagerly and inside compiled functions (`tf.function`, `jax.jit`, `fit`). On JAX the
    block is recorded as it runs, and its derivative is compiled from the second time on; a function under `jax.jit`
    may close over what is watched, but one with a derivative of its own (`jax.custom_jvp`, `jax.custom_vjp`) may not:
    a derivative by it is an error there. On torch a
    derivative is part of torch's own graph, so that `loss.backward()` works through it; where nobody will
    differentiate it again, take it under `torch.no_grad()`, which saves time and memory.

    Args:
        persistent: whether derivatives may be asked for more than once. A persistent tape also records
            the calls made inside its own block.
        watch_accessed_variables: whether trainable variables are watched as soon as they are read.

    Cost:
        `gradient` costs about two evaluations of the block and `jvp` one to three; a Jacobian costs one
        pullback for each element of the target (of one example, for `batch_jacobian`), vectorized.

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

    def __init__(self, persistent=False, watch_accessed_variables=True):
        validation.require_flag("GradientTape", "persistent", persistent)
        validation.require_flag("GradientTape", "watch_accessed_variables", watch_accessed_variables)
        self._persistent = persistent
        self._tape = backend.Tape(watch_accessed_variables)
        self._inside = False
        self._recording = False
        self._used = False
        self._pauses: list = []

    def __enter__(self):
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

    def __exit__(self, *exception):
        # Twice, where an interrupt came in between: what is undone already stays so.
        try:
            self._leave()
        except BaseException:
            self._leave()
            raise

    def __del__(self):
        # An interrupt just as `__exit__` begins leaves the block open until the tape is dropped.
        if getattr(self, "_inside", False) and self._thread == threading.get_ident():
            self._leave()

    def _leave(self):
        if self._inside:
            self._tape.__exit__()
        self._inside = self._recording = False

    def watch(self, tensor):
        """Follows `tensor`: a tensor, a `keras.Variable`, or any nesting of them.

        Args:
            tensor: real floating-point tensors or variables, of any shape. A variable that is not
                trainable is followed from its next read on. Beside these, None and integers are passed over.

        Raises:
            ValueError: for anything else, naming what was received.
            RuntimeError: outside the tape's block.
        """
        if not self._inside:
            raise RuntimeError(
                "GradientTape.watch was called outside the tape's block. Call it inside `with tape:`, before "
                "the computation that is to be differentiated."
            )
        for x in vectors.watchable(tensor, "What a GradientTape watches"):
            if validation.is_variable(x):
                self._tape.watch_variable(x)
            else:
                self._tape.watch(x)

    def watched_variables(self):
        """Returns a tuple of the `keras.Variable`s watched so far, in the order in which they were met.

        On TensorFlow, raw `tf.Variable`s follow.
        """
        return tuple(self._tape.watched_variables())

    def stop_recording(self):
        """Pauses this tape, and no other, for a `with` block: what is computed there is a constant to it.

        Raises:
            RuntimeError: if the tape is not recording.
        """
        return _Pause(self)

    def reset(self):
        """Throws the record away, and everything watched; the tape goes on recording from here.

        Raises:
            RuntimeError: outside the tape's block.
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

    def gradient(self, target, sources, output_gradients=None, unconnected_gradients="none"):
        r"""Returns the gradient of `target` by `sources`, $\sum_k (\partial y_k / \partial x)^\top u_k$.

        Args:
            target: a tensor or any nesting of tensors $y_k$, which are summed, as are their elements.
            sources: what to differentiate by: tensors and variables in any nesting. Beside those that have a
                derivative there may be None and integers, here and in `target`.
            output_gradients: the cotangents $u_k$, in the structure and shapes of `target`; None stands
                for ones.
            unconnected_gradients: what to return for a source that `target` does not depend on: None
                (`"none"`) or zeros (`"zero"`). A `tf.UnconnectedGradients` is taken as well.

        Returns:
            The structure of `sources`, each entry with its source's shape and dtype, None for None and integers.

        Raises:
            ValueError: for a target or source that is not a real floating-point tensor or variable, or an
                unknown option.
            RuntimeError: at the second call on a tape that is not persistent.
        """
        targets, flat_sources, zero = self._checked(target, sources, unconnected_gradients, "gradient")
        cotangents = vectors.like(output_gradients, target, "output_gradients", "`target`", vectors.ones)
        with self._pulling(targets) as targets:
            gradients = backend.pullback(self._tape, targets, flat_sources, cotangents)
        if zero:
            gradients = [vectors.zeros(s) if g is None else g for g, s in zip(gradients, flat_sources, strict=True)]
        return vectors.pack_as(sources, gradients)

    def jvp(self, target, sources, tangents, unconnected_gradients="none"):
        r"""Returns the derivative of `target` along `tangents`, $\sum_i (\partial y / \partial x_i) v_i$.

        Args:
            target: a tensor or any nesting of tensors.
            sources: tensors and variables in any nesting.
            tangents: the directions $v_i$, in the structure and shapes of `sources`; None stands for zeros.
            unconnected_gradients: what to return for a target that depends on no source: None (`"none"`)
                or zeros (`"zero"`).

        Returns:
            The structure of `target`, each entry with its target's shape and dtype.

        Raises:
            ValueError, RuntimeError: as `gradient`.
        """
        targets, flat_sources, zero = self._checked(target, sources, unconnected_gradients, "jvp")
        tangents = vectors.like(tangents, sources, "tangents", "`sources`", vectors.zeros)
        with self._pulling(targets) as targets:
            pushed = backend.pushforward(self._tape, targets, flat_sources, tangents)
        if zero:
            pushed = [vectors.zeros(t) if p is None else p for p, t in zip(pushed, targets, strict=True)]
        return vectors.pack_as(target, pushed)

    def linearize(self, target, sources, unconnected_gradients="none"):
        r"""Returns the linear map $v \mapsto \sum_i (\partial y / \partial x_i) v_i$: what needs no $v$ is done once.

        Args:
            target: a tensor or any nesting of tensors.
            sources: tensors and variables in any nesting.
            unconnected_gradients: as for `jvp`.

        Returns:
            A function of the tangents, in the structure and shapes of `sources`, that returns what `jvp` does. It can
            be called after a tape that is not persistent was used, and keeps the record in memory.

        Raises:
            ValueError, RuntimeError: as `gradient`.
        """
        targets, flat_sources, zero = self._checked(target, sources, unconnected_gradients, "linearize")
        with self._pulling(targets) as targets:
            push_flat = backend.linearize(self._tape, targets, flat_sources)

        def push(tangents):
            pushed = push_flat(vectors.like(tangents, sources, "tangents", "`sources`", vectors.zeros))
            if zero:
                pushed = [vectors.zeros(t) if p is None else p for p, t in zip(pushed, targets, strict=True)]
            return vectors.pack_as(target, pushed)

        return push

    def jacobian(
        self,
        target,
        sources,
        unconnected_gradients="none",
        parallel_iterations=None,
        experimental_use_pfor=True,
        chunk_size=None,
        mode="reverse",
    ):
        r"""Returns the Jacobian of `target` by `sources`, $J_{k i} = \partial y_k / \partial x_i$.

        Args:
            target: one tensor, of any shape.
            sources: tensors and variables in any nesting.
            unconnected_gradients: as for `gradient`.
            parallel_iterations: TensorFlow's name for `chunk_size`.
            experimental_use_pfor: whether directions are computed together, vectorized; if False, one at a time,
                whatever the `chunk_size`.
            chunk_size: how many directions to compute at once; all by default. It bounds the memory and changes
                no value.
            mode: `"reverse"`, one pullback for each element of `target`; `"forward"`, one push for each element of
                `sources`; or `"auto"`, whichever are fewer.

        Returns:
            The structure of `sources`, each entry of shape `target.shape + source.shape`.

        Raises:
            ValueError, RuntimeError: as `gradient`.
        """
        target = self._checked_tensor(target, "jacobian")
        chunk_size = jacobians.rows_at_once(
            "GradientTape.jacobian", chunk_size, parallel_iterations, experimental_use_pfor
        )
        _, flat_sources, zero = self._checked(target, sources, unconnected_gradients, "jacobian")
        mode = jacobians.checked_mode(mode)
        with self._pulling([target]) as targets:
            (blocks,) = jacobians.jacobians(self._tape, targets, flat_sources, mode, chunk_size, zero)
        return vectors.pack_as(sources, blocks)

    def batch_jacobian(
        self,
        target,
        source,
        unconnected_gradients="none",
        parallel_iterations=None,
        experimental_use_pfor=True,
        chunk_size=None,
        mode="reverse",
        check_independence=False,
    ):
        r"""Returns the Jacobian of each example, $J_{b k i} = \partial y_{b k} / \partial x_{b i}$.

        It is right where the examples are independent of one another, which it does not see for itself and
        `check_independence` does; it costs one pullback of the whole batch for each element of one example's target.

        Args:
            target: one tensor of shape `(batch, ...)`.
            source: tensors and variables of shape `(batch, ...)`, in any nesting.
            unconnected_gradients: as for `gradient`, but of no effect: zeros are returned for a source that `target`
                does not depend on, as TensorFlow does here.
            parallel_iterations: TensorFlow's name for `chunk_size`.
            experimental_use_pfor: as for `jacobian`.
            chunk_size: how many directions to compute at once, each for the whole batch; all by default. It
                bounds the memory and changes no value.
            mode: as for `jacobian`, counted in elements of one example.
            check_independence: whether to look first, by six pullbacks, whether the target of an example depends on
                the source of another one, and to raise an error if so. Not inside compiled functions. The tape
                does not know which layer is the cause; `kg.diagnostics.batch_independence` does.

        Returns:
            The structure of `source`, each entry of shape `(batch, *target.shape[1:], *source.shape[1:])`.

        Raises:
            ValueError: if the batch sizes differ or a rank is below 2; with `check_independence`, if the examples
                depend on one another; and as `gradient`.
            RuntimeError: as `gradient`.
        """
        validation.require_flag("batch_jacobian", "check_independence", check_independence)
        target = self._checked_tensor(target, "batch_jacobian")
        chunk_size = jacobians.rows_at_once(
            "GradientTape.batch_jacobian", chunk_size, parallel_iterations, experimental_use_pfor
        )
        _, flat_sources, _ = self._checked(target, source, unconnected_gradients, "batch_jacobian")
        mode = jacobians.checked_mode(mode)
        for s in flat_sources:
            jacobians.check_batch("GradientTape.batch_jacobian", target, s)
        with self._pulling([target]) as targets:
            if check_independence:
                independence.require_of_record("GradientTape.batch_jacobian", self._tape, targets, flat_sources)
            (blocks,) = jacobians.jacobians(self._tape, targets, flat_sources, mode, chunk_size, True, batch_axes=1)
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
    def _pulling(self, targets):
        """The time in which derivatives are computed; gives the targets as tensors."""
        if any(validation.is_variable(t) for t in targets):
            # Reading a variable is what makes it the target of a tape that watches it.
            with contextlib.nullcontext() if self._inside else self:
                targets = [ops.convert_to_tensor(t) for t in targets]
        if self._recording and not self._persistent:
            self._pause()
        self._used = True
        yield targets
        if not self._persistent:
            self._tape.release()

    def _checked(self, target, sources, unconnected_gradients, method):
        if self._used_up():
            raise RuntimeError(
                "This GradientTape has already been used: a tape gives derivatives once, unless it was made "
                "with `kg.GradientTape(persistent=True)`."
            )
        unconnected = unconnected_gradients
        if isinstance(unconnected, enum.Enum):
            unconnected = unconnected.value  # TensorFlow has an enum for it
        if not validation.is_one_of(unconnected, ("none", "zero")):
            raise ValueError(
                "unconnected_gradients must be 'none' or 'zero'. "
                f"Received: unconnected_gradients={validation.shown(unconnected_gradients)}."
            )
        targets = vectors.watchable(target, f"The target of GradientTape.{method}")
        flat_sources = vectors.watchable(sources, f"A source of GradientTape.{method}")
        return targets, flat_sources, unconnected == "zero"

    def _checked_tensor(self, target, method):
        if nesting.is_nested(target):
            raise ValueError(
                f"GradientTape.{method} takes one target tensor. Received: a {type(target).__name__}. Make the "
                "tape persistent and call it once for each target, or concatenate them."
            )
        return target


class _Pause(Block):
    """The time of `stop_recording`."""

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
