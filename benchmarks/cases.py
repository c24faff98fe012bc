"""The cases of a benchmark: each row with its modes, models and batch sizes, as code that runs."""

import keras

from benchmarks import hand_written, models, rows


def cases(part, containing=""):
    """Yields all combinations of row, mode, model and batch size."""
    backend = keras.backend.backend()
    for row in rows.rows_of(backend, part, containing):
        for mode in row.modes_on(backend):
            if mode in hand_written.module().MODES:
                for model, batches in row.batches.items():
                    yield from ((row, mode, model, batch) for batch in batches)


def prepare(row, mode, model_name, batch):
    """Returns our and the hand-written code as functions without arguments."""
    compile_ours, compile_theirs = hand_written.module().MODES[mode]
    model = models.build(model_name)
    x, y = map(keras.ops.convert_to_tensor, models.data(model, batch))
    ours = row.ours(model, compile_ours) if row.compiles else compile_ours(row.ours(model))
    if callable(row.reference):
        theirs = row.reference(model, compile_ours)
    else:
        theirs = hand_written.function(row.reference)(hand_written.twin(model, mode), compile_theirs)
    return lambda: ours(x, y), lambda: theirs(x, y)
