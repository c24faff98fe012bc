"""Writes docs/zoo.md from what was found: `python -m tests.zoo.table`."""

import json

from tests.zoo.run import BACKENDS, RESULTS, ROOT, known

PAGE = ROOT / "docs" / "zoo.md"
HEAD = """# The zoo

This page shows which models the package was tried with, and what works for them: small configurations of the backbones
of keras_hub, the models of keras.applications, and models like those of Keras' public examples.
`python -m tests.zoo.run` tries them, and continues where it stopped. The backbones need
`pip install "keras-gradtools[zoo]"`. `python -m tests.zoo.table` writes this page.

A cell that was not tried on a backend is empty, and a model that was not tried at all has no row. The models of
keras.applications have random weights. Their normalization statistics were computed from random images, because with
the statistics of a new model, their outputs in inference mode are around 1e-17. Some of these models return NaN after
one training step, so a monitor has nothing to measure, and the cell is unclear.

| check | what it tries |
| --- | --- |
| `gradient`, `hvp`, `ggn` | compared with central differences, in double precision if the model allows it |
| `jacobian` | the same for the batch Jacobian with respect to the inputs, or to the embeddings of tokens |
| `independence` | `batch_independence` agrees with what an example returns in a batch of its copies |
| `layer_derivatives` | `layer_derivatives` reports no layer, or only layers whose product with the Hessian is wrong |
| `penalty`, `adversarial`, `second_order` | two training steps, with finite losses and weights |
| `..._monitor`, `newton_step` | one measurement or step during `fit`, with finite numbers |
| `save` | a wrapped model computes the same after it is saved and loaded |

| a cell | means |
| --- | --- |
| yes | right |
| refused | a clear error, for example because tokens have no gradient or an attack needs a classifier |
| - | does not apply |
| unclear | the differences do not converge, for example at the kinks of ReLU and max-pooling in single precision |
| Keras | Keras or the model itself fails without this package, too, mostly when it is saved |
| time | stopped after the time for a cell |
| WRONG, CRASH | a defect. The one CRASH is TensorFlow's: its oneDNN kernels end the process ([limits](limits.md)) |
"""
WORDS = {
    "right": "yes",
    "error": "refused",
    "none": "-",
    "unclear": "unclear",
    "framework": "Keras",
    "timeout": "time",
    "wrong": "WRONG",
    "crash": "CRASH",
}


def order_of_checks():
    lines = (RESULTS / "torch.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["check"] for line in lines))


def page():
    parts = [HEAD]
    checks = order_of_checks()
    for backend in BACKENDS:
        found = known(backend)
        models = list(dict.fromkeys(model for model, _ in found))
        tried = [check for check in checks if any((model, check) in found for model in models)]
        counts = [sum(cell["status"] == status for cell in found.values()) for status in ("right", "error", "wrong")]
        longest = max(found.values(), key=lambda cell: cell["seconds"])
        parts.append(
            f"## {backend}\n\n{len(models)} models, {len(found)} cells: {counts[0]} right, {counts[1]} refused, "
            f"{counts[2]} wrong. The longest took {longest['seconds']:.0f} s: `{longest['check']}` of "
            f"{longest['model']}.\n"
        )
        parts.append(f"| | {' | '.join(tried)} |\n|{' --- |' * (len(tried) + 1)}")
        for model in models:
            cells = [found.get((model, check)) for check in tried]
            parts.append(f"| {model} | {' | '.join('' if c is None else WORDS[c['status']] for c in cells)} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
