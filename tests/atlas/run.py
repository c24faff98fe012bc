"""Tries every operation and layer on this backend: `KERAS_BACKEND=jax python -m tests.atlas.run`.

Each case becomes a line of tests/atlas/results/BACKEND.jsonl; a case that stands there already is left out, so that a
run that was stopped goes on. `python -m tests.atlas.table` makes docs/support.md of the three files.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import time
import warnings

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def in_double_precision():
    """Lets Keras compute in float64 where it is given that, which it narrows to float32 on JAX and torch."""
    os.environ["JAX_ENABLE_X64"] = "1"
    import keras

    keras.config.set_floatx("float64")
    from keras_gradtools.keras_internals.lookup import find

    find("keras.src.backend.common.dtypes").BIT64_TO_BIT32_DTYPE.update(float64="float64", complex128="complex128")


class TimeOut(BaseException):
    """A case that takes too long."""


def _stop(number, frame):
    raise TimeOut


def examined(case, seconds):
    """The line of one case."""
    from tests.atlas import derivatives

    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    start = time.perf_counter()
    try:
        found = derivatives.examine(case)
    except TimeOut:
        found = {"value": f"error: took more than {seconds} s"}
    finally:
        signal.alarm(0)
    return _line(case, time.perf_counter() - start, found)


def _line(case, seconds, found):
    return {"name": case.name, "kind": case.kind, "seconds": round(seconds, 1), "found": found}


def write(path, lines):
    """The file of results anew."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of operations and layers; they are tried anew")
    parser.add_argument("--part", choices=("operations", "layers"))
    parser.add_argument("--seconds", type=int, default=180, help="for one case at most")
    parser.add_argument("--show", action="store_true", help="print what is not right, and write no file")
    options = parser.parse_args()

    in_double_precision()
    import keras

    from tests.atlas.all_cases import cases

    warnings.simplefilter("ignore")
    path = RESULTS / f"{keras.config.backend()}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["name"], line["kind"]): line for line in lines if line["name"] not in options.only}
    for case in cases(options.part):
        if options.only and case.name not in options.only or (case.name, case.kind) in done:
            continue
        if not options.show:
            # What stands there if the framework ends the process, as TensorFlow does for a transform of no numbers.
            write(path, [*done.values(), _line(case, 0, {"value": "error: the framework ends the process"})])
        line = examined(case, options.seconds)
        bad = {k: v for k, v in line["found"].items() if v not in ("right", "unknown")}
        if options.show or any(v.startswith("wrong") for v in bad.values()):
            print(f"{case.key} ({line['seconds']} s): {bad or 'right'}", flush=True)
        if not options.show:
            done[case.name, case.kind] = line
            write(path, done.values())
        if keras.config.backend() == "jax" and len(done) % 20 == 0:
            import jax

            jax.clear_caches()


if __name__ == "__main__":
    sys.exit(main())
