"""A process that tries cells of the zoo: reads a model and a check in a line, writes what was found in another."""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings

import keras

from keras_gradtools.keras_internals.lookup import find
from tests.zoo.catalogue import MODELS
from tests.zoo.checks import CHECKS, IN_DOUBLE


def main():
    answers = os.fdopen(os.dup(1), "w")
    # What frameworks print must not be taken for an answer.
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        name, check = json.loads(line)
        in_double = check in IN_DOUBLE and has_double()
        status, text, start = in_precision("float64" if in_double else "float32", name, check)
        if status == "framework" and in_double:
            # Some models mix single precision into double.
            status, text, start = in_precision("float32", name, check)
            in_double = False
        if check in IN_DOUBLE and not in_double:
            text = f"{text} (single precision)"
        seconds = round(time.perf_counter() - start, 2)
        answer = {"model": name, "check": check, "status": status, "seconds": seconds, "text": text}
        print(json.dumps(answer), file=answers, flush=True)


def has_double():
    """Whether the framework computes in double precision, which JAX does only where it was told to."""
    with keeping_double():
        return keras.backend.standardize_dtype(keras.ops.convert_to_tensor(1.0, "float64").dtype) == "float64"


def in_precision(precision, name, check):
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    with keeping_double() if precision == "float64" else contextlib.nullcontext():
        return tried(MODELS[name], CHECKS[check])


@contextlib.contextmanager
def keeping_double():
    """Lets Keras compute in float64 where it is given that, which it narrows to float32 on JAX and torch."""
    narrowed = find("keras.src.backend.common.dtypes").BIT64_TO_BIT32_DTYPE
    before = dict(narrowed)
    narrowed.update(float64="float64", complex128="complex128")
    try:
        yield
    finally:
        narrowed.update(before)


def tried(make, check):
    """The status, the text, and when the check itself began."""
    start = time.perf_counter()
    try:
        # The same weights each time; a model has been trained by the last check.
        keras.utils.set_random_seed(0)
        specimen = make()
        start = time.perf_counter()
        if check in IN_DOUBLE.values() and not specimen.has_slopes:
            return "none", "derivatives are not those of the values: a straight-through step", start
        found = check(specimen)
    except Exception as error:
        return (*of_error(error), start)
    finally:
        with contextlib.suppress(Exception):
            keras.backend.clear_session(free_memory=False)
    return found.status, found.text[:300], start


def of_error(error):
    """An error is clear if it is one of ours; `framework`, where Keras or a framework raised it."""
    text = " ".join(str(error).split())[:300]
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, (ValueError, NotImplementedError)) and "keras_gradtools" in last.filename:
        return "error", text
    status = "crash" if any(part in last.filename for part in ("keras_gradtools", "tests")) else "framework"
    return status, f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}:{last.lineno})"


if __name__ == "__main__":
    main()
