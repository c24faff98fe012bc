"""The command `keras-gradtools report MODEL.keras DATA.npz -o report.html`."""

import argparse
import importlib
import os
import pathlib
import sys
import zipfile

import keras
import numpy as np

from keras_gradtools.diagnostics.layer_verdict import cause_of
from keras_gradtools.diagnostics.model_report import page
from keras_gradtools.diagnostics.model_report.report import NAMES, report

_LABELS, _WEIGHTS = "y", "sample_weight"


class UnusableInput(Exception):
    """A file or an option that cannot be used. The message is one line that says what to do."""


def main(arguments=None):
    """Runs the command, and returns its exit code: 0, or 2 if the model, the data or an option cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        for module in options.imported:
            _import(module)
        data = read_data(options.data)
        model = read_model(options.model)
        _require_writable(options.output)
        page.require_jinja2()
        found = report(
            model,
            data,
            options.loss,
            examples=options.examples,
            checks=options.checks,
            clip=options.clip,
            max_seconds=options.max_seconds,
            seed=options.seed,
            verbose=0 if options.quiet else 1,
        )
    except (UnusableInput, ValueError, ImportError) as error:
        print(f"keras-gradtools: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    found.save(options.output)
    print(f"{found}\nWrote {options.output}")
    return 0


def read_model(path):
    """The model in a `.keras` file. No code in the file is run."""
    _require_file(path, "MODEL", ".keras file", "model.save('model.keras')")
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise UnusableInput(
            f"MODEL must be a .keras file, which can be loaded without running code from it. Received: {path}. Save "
            "the model with model.save('model.keras')."
        )
    try:
        return keras.saving.load_model(path, safe_mode=True)
    except Exception as error:
        raise UnusableInput(f"{path} cannot be loaded. {_advice_for(error)} Keras says: {cause_of(error)}.") from error


def read_data(path):
    """The data in an `.npz` file: `(x, y)`, `(x, y, sample_weight)`, or `x` alone."""
    _require_file(path, "DATA", ".npz file", "numpy.savez('data.npz', x=x, y=y)")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        raise UnusableInput(
            f"{path} is not an .npz file of numbers. Write it with numpy.savez('data.npz', x=x, y=y). NumPy says: "
            f"{cause_of(error)}."
        ) from error
    inputs = {name: array for name, array in arrays.items() if name not in (_LABELS, _WEIGHTS)}
    if not inputs:
        raise UnusableInput(
            f"{path} must have the inputs as `x`, or each input by its name. Received: the arrays {sorted(arrays)}."
        )
    x = inputs["x"] if set(inputs) == {"x"} else inputs
    if _LABELS not in arrays:
        return x if not isinstance(x, dict) else (x,)
    return (x, arrays[_LABELS]) if _WEIGHTS not in arrays else (x, arrays[_LABELS], arrays[_WEIGHTS])


def _require_file(path, name, kind, how):
    if not path.is_file():
        raise UnusableInput(f"{name} must be a {kind}. Received: {path}, which is not a file. Write one with {how}.")


def _require_writable(path):
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UnusableInput(f"The report cannot be written to {path}. Choose a file in an existing folder with -o.")


def _import(module):
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UnusableInput(f"--import {module} failed: {cause_of(error)}.") from error
    finally:
        sys.path.remove(os.getcwd())


def _advice_for(error):
    text = str(error)
    if "Could not locate" in text or "Unknown" in text or "custom" in text.lower():
        return "It has custom objects: name the module that registers them with --import MODULE."
    if "safe_mode" in text or "unsafe" in text or "Lambda" in text:
        return "It contains code, such as a Lambda layer, which this command does not run: use a registered layer."
    return "Save it again with this version of Keras."


def _parser():
    parser = argparse.ArgumentParser(prog="keras-gradtools", description="Derivatives of Keras models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "report",
        help="examine a saved model on a batch of data, and write a page",
        description="Examines the derivatives of a saved model on a batch of data, and writes an HTML page that begins "
        "with what is wrong and what to do. No code in the model's file is run.",
    )
    command.add_argument("model", metavar="MODEL", type=pathlib.Path, help="a .keras file")
    command.add_argument(
        "data",
        metavar="DATA",
        type=pathlib.Path,
        help="an .npz file with `x` and `y`, and `sample_weight` if there are any; several inputs by their names",
    )
    command.add_argument("-o", "--output", type=pathlib.Path, default=pathlib.Path("report.html"), help="the page")
    command.add_argument("--loss", help="the name of a Keras loss; by default, the loss the model was compiled with")
    command.add_argument("--examples", type=int, default=64, help="the largest number of examples (64)")
    command.add_argument("--checks", nargs="+", choices=NAMES, help="the checks to run; by default, all")
    command.add_argument(
        "--clip", nargs=2, type=float, metavar=("MIN", "MAX"), help="the range of the inputs, for attacks"
    )
    command.add_argument(
        "--max-seconds", type=float, default=300.0, help="after this time, no further check begins (300)"
    )
    command.add_argument("--seed", type=int, default=0, help="the seed of all random numbers (0)")
    command.add_argument(
        "--import",
        dest="imported",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours to import first, which registers custom layers and losses",
    )
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return parser
