"""The cost of recording: a forward pass under a tape, compared with one without a tape."""

import keras_gradtools as kg
from benchmarks.rows import row


@row("bare tape", {"MLP": 128, "conv net": 64})
def forward(model):
    def ours(x, y):
        with kg.GradientTape() as tape:
            tape.watch(x)
            logits = model(x)
        return logits

    return ours
