"""Every public function and class refuses bad arguments in the house's form, and takes what is legal.

The calls are those of `tests/public_calls.py`. `BAD` holds what is no argument of a sort.
"""

import json
import pathlib
import re
import traceback

import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
import keras  # noqa: E402
import matplotlib.pyplot  # noqa: E402
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402

import keras_gradtools as kg  # noqa: E402
from tests.public_calls import PICTURES, VECTOR, X, Y, classifier, hessian_operator, model, rows, weighted  # noqa: E402

PACKAGE = str(pathlib.Path(kg.__file__).resolve().parent)
# Longer ones print what they were given.
LONGEST = 900


def generator():
    yield from X


def symbolic():
    return keras.Input((3,), name="symbolic")


BAD = {
    "model": lambda: [None, "abc", 3, object(), generator(), symbolic(), {1, 2}, ops.ones(3)],
    "function": lambda: [None, "abc", 3, object(), generator(), symbolic(), {1, 2}],
    "examples": lambda: [None, "abc", object(), generator(), symbolic(), {1, 2}, X + 1j, 1.0, [object()], np.abs],
    "tensor": lambda: ["abc", object(), generator(), symbolic(), {1, 2}, VECTOR * 1j, np.arange(3)],
    "labels": lambda: ["abc", object(), generator(), symbolic(), {1, 2}, Y * 1j, Y[:3], np.array(["a"] * 4)],
    "structure": lambda: [None, "abc", 3, object(), generator(), symbolic(), {1, 2}, ops.ones(3)],
    "count": lambda: ["abc", 0, -1, 2.5, True, np.nan, 1j, object(), generator(), symbolic(), {1}, ops.ones(3), [2]],
    "number": lambda: ["abc", np.nan, True, 1j, object(), generator(), symbolic(), {1.0}, ops.ones(3), [1.0]],
    "seed": lambda: ["abc", 1j, object(), generator(), symbolic(), {"a"}, 2.5, -1, True, np.nan],
    "flag": lambda: ["abc", 1j, object(), generator(), symbolic(), {1}, ops.ones(3), 2],
    "choice": lambda: ["abc", None, 7, 1j, object(), generator(), symbolic(), {1}, ops.ones(3), [], True],
    "data": lambda: [None, "abc", 3, object(), symbolic(), {1, 2}, 1j],
}


BAD["clip"] = lambda: ["abc", 3, 1j, object(), generator(), symbolic(), {1}, (1.0, 0.0), (0.0,), ("a", "b")]
BAD["positions"] = lambda: ["abc", 1.5, None, object(), generator(), symbolic(), {0}, ops.ones(3), True, 7, ()]
BAD["axes"] = lambda: ["abc", 1.5, object(), generator(), symbolic(), {0}, ops.ones(3), [True], [7], [0, 0], []]
BAD["count from 0"] = lambda: [x for x in BAD["count"]() if not (isinstance(x, int) and x == 0)]
BAD["projections"] = lambda: [x for x in BAD["count"]() if not (isinstance(x, int) and x == -1)]  # -1: all
BAD["history"] = lambda: [None, "abc", 3, object(), generator(), symbolic(), {1, 2}]
BAD["picture"] = lambda: [None, "abc", 3, object(), generator(), symbolic(), {1, 2}, np.ones(3) * 1j]
BAD["node"] = lambda: ["abc", object(), generator(), {1, 2}, VECTOR * 1j, np.arange(3)]
BAD["scale"] = lambda: ["abc", np.nan, True, 1j, object(), generator(), symbolic(), {1.0}, ops.ones(3), [1.0]]
BAD["nesting"] = lambda: [None, "abc", 3, object(), generator(), {1, 2}]
BAD["cotangent"] = lambda: ["abc", object(), generator(), symbolic(), {1, 2}, np.ones(4)]


BAD["loss"] = lambda: ["abc", 3, 1j, object(), generator(), symbolic(), {1}, ops.ones(3)]
BAD["variables"] = lambda: ["abc", 3, 1j, object(), symbolic(), {1}, ops.ones(3), [], [None], ["kernel"]]
BAD["epsilons"] = lambda: ["abc", None, (), 0.1j, object(), symbolic(), {"a"}, (-0.1,), ("a",), (np.nan,), (True,)]
BAD["every"] = lambda: ["abc", None, 0, -1, 2.5, True, 1j, object(), generator(), symbolic(), {1}, ops.ones(3)]
BAD["quantities"] = lambda: ["abc", 3, 1j, object(), symbolic(), {1}, ops.ones(3), [], ["abc"], [None]]
BAD["rank"] = lambda: ["abc", -1, 2.5, True, np.nan, 1j, object(), symbolic(), {1}, ops.ones(3)]
BAD["inputs"] = lambda: ["abc", 3, 1j, object(), generator(), symbolic(), {1}, ops.ones(3), [], [None]]
BAD["vector"] = lambda: [
    "abc",
    3,
    object(),
    generator(),
    symbolic(),
    {1},
    np.ones(7),
    np.ones(8) * 1j,
    None,
    [None] * 8,
]
BAD["column"] = lambda: ["abc", 3, object(), generator(), symbolic(), {1}, np.ones(7), np.ones(3) * 1j, [None] * 3]
BAD["matrix"] = lambda: ["abc", 3, object(), generator(), symbolic(), {1}, None, np.ones((3, 2)), np.eye(3) * 1j]
BAD["directions"] = lambda: ["abc", 3, object(), symbolic(), {1}, np.ones(7), [None, None], np.ones((2, 8)) * 1j]
BAD["text"] = lambda: [None, 3, 1j, object(), generator(), symbolic(), {1}, ops.ones(3)]
BAD["names"] = lambda: ["abc", 3, 1j, object(), generator(), symbolic(), {1}, ops.ones(3), [None]]
BAD["directory"] = lambda: [3, 1j, object(), symbolic(), {1}, ops.ones(3)]
BAD["bar"] = lambda: ["abc", None, 7, 1j, object(), symbolic(), {1}, ops.ones(3), []]
BAD["verbosity"] = lambda: ["abc", 7, -1, 1j, object(), symbolic(), {1}, ops.ones(3)]
BAD["layer axes"] = lambda: ["abc", 1.5, object(), symbolic(), {0}, ops.ones(3), [True], [0, 0], []]


def sorts_of(row):
    """The sort of each argument of a row; with a question mark, None is one, too."""
    sorts = row[2]
    return dict(part.split(": ") for part in sorts.split(", ")) if isinstance(sorts, str) else sorts


def bad_values(sort):
    """What is no argument of a sort."""
    return [x for x in BAD[sort.removesuffix("?")]() if not (sort.endswith("?") and x is None)]


def label(x):
    if callable(x) and not isinstance(x, (keras.KerasTensor,)) and hasattr(x, "__name__"):
        return x.__name__
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{type(x).__name__}{tuple(x.shape)}"
    return re.sub(r" at 0x\w+", "", repr(x))[:30]


ROWS = rows()
CASES = [(name, argument) for name, row in ROWS.items() for argument in sorts_of(row)]


# What stands for the name of an argument in messages; where it is the first of a function, "argument 0".
WORDS = {
    "fun": "function",
    "model_fun": "function",
    "loss_fun": "function",
    "x": "argument|example|input|batch|tensor|vector",
    "weights": "argument",
    "args": "primals|argument",
    "model": "model|layer",
    "layer": "layer|model",
    "target": "target|tensor",
    "tensor": "tensor|watch",
    "jacobian": "numbers",
    "image": "numbers",
    "hessian": "numbers",
    "a": "matrix",
    "b": "vector|matrix",
    "offset": "multiplies|vector",
    "sources": "source",
    "inputs": "input",
    "cotangent": "output_gradients",
    "tangent": "tangents",
}


def complaint(error, argument):
    """What is wrong with an error about an argument; None if it has the house's form."""
    message = str(error)
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if not isinstance(error, (ValueError, TypeError, RuntimeError)):
        return "of another type"
    if not last.startswith(PACKAGE):
        return f"raised in {last.rpartition('site-packages/')[2]}"
    if "Received" not in message:
        return "without what was received"
    if not re.search(rf"\b{argument}\b|{WORDS.get(argument, argument)}", message, re.IGNORECASE):
        return "without a word of the argument"
    if len(message) > LONGEST or "array(" in message or "tensor(" in message:
        return "prints what it was given"
    return None


def found(row, argument, value):
    """What is wrong with how a row takes a bad value of an argument."""
    call, right, _ = ROWS[row]
    try:
        call(**{**right, argument: value})
    except Exception as error:
        problem = complaint(error, argument)
        return problem and f"{problem}: {type(error).__name__}: {str(error)[:150]!r}"
    return "taken"


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("row", ROWS)
def test_the_row_is_right(row):
    call, right, _ = ROWS[row]
    call(**right)


@pytest.mark.parametrize(("row", "argument"), CASES, ids=lambda x: x)
def test_bad_input(row, argument):
    sort = sorts_of(ROWS[row])[argument]
    problems = {}
    for value in bad_values(sort):
        problem = found(row, argument, value)
        if problem:
            problems[label(value)] = problem
    assert not problems, "\n".join(f"{value}: {problem}" for value, problem in problems.items())


def test_the_numbers_of_numpy_are_numbers():
    one, two, tenth = np.int64(1), np.int32(2), np.float32(0.1)
    np.testing.assert_array_equal(kg.jacobian(lambda x: x, argnums=np.int64(0), chunk_size=two)(VECTOR), np.eye(3))
    np.testing.assert_array_equal(kg.per_example_grad(weighted, np.int64(0))(VECTOR, X), X)
    found = kg.diagnostics.local_lipschitz(model(), X, radius=tenth, iterations=two, seed=one)
    same = kg.diagnostics.local_lipschitz(model(), X, radius=float(tenth), iterations=2, seed=1)
    np.testing.assert_array_equal(found, same)
    options = {"steps": one, "restarts": one, "batch_size": two, "seed": one, "verbose": 0}
    assert kg.attacks.pgd(classifier(), PICTURES, Y.tolist(), np.float64(0.1), **options).shape == PICTURES.shape
    assert hessian_operator().diagonal(np.int64(3), seed=one).value.shape == (8,)
    assert kg.curvature.conjugate_gradients(np.eye(3), [1.0, 2.0, 3.0], max_iterations=two).reason == "converged"


@pytest.mark.parametrize(
    "make",
    [
        lambda n: kg.optimizers.Newton(max_attempts=n),
        lambda n: kg.optimizers.NewtonCG(max_iterations=n, max_attempts=n),
        lambda n: kg.attacks.PGD(0.1, steps=n, restarts=n),
        lambda n: kg.layers.InputGradientPenalty(keras.layers.Dense(1, name="d"), 0.1, every=n, name="p"),
        lambda n: kg.layers.Laplacian(keras.layers.Dense(1, name="d"), axes=[n], name="l"),
    ],
)
def test_counts_of_numpy_are_saved(make):
    assert json.dumps(make(np.int64(2)).get_config()) == json.dumps(make(2).get_config())
