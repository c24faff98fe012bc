"""Writes docs/zoo.md from what was found: `python -m tests.zoo.table`."""

import json

from tests.zoo.run import BACKENDS, RESULTS, ROOT, known

PAGE = ROOT / "docs" / "zoo.md"
HEAD = """# The zoo

Small configurations of the backbones of keras_hub, and models of the kinds that Keras' public examples show, each
tried in every way that this package has. `python -m tests.zoo.run` tries them and goes on where it stopped (the
backbones need `pip install "keras-gradtools[zoo]"`), `python -m tests.zoo.table` writes this page. Cells that were
not tried on a backend are empty, and models without any are left out: so are those of keras.applications
(`tests/zoo/applications.py`). In inference mode their fresh weights make signals of 1e-17, beside which any step of a
difference is large: MobileNet's slopes at both sides differ by 1.7 times the derivative, for steps of 1e-4 to 1e-8, so
that differences say nothing. `CurvatureMonitor` of EfficientNet logs NaN there in single precision.

- `gradient`, `hvp`, `ggn`, `jacobian`: against central differences, in double precision where the model allows it;
  `jacobian` is the batch Jacobian by the inputs, or by the embedding of tokens.
- `independence`: whether `batch_independence` agrees with what an example returns among copies of itself.
  `layer_derivatives`: whether it accuses no layer, or a product with the Hessian is wrong as it says.
- `penalty`, `adversarial`, `second_order`: two steps of each trainer, with finite losses and weights. The monitors:
  one measurement each, of finite numbers. `save`: a trainer saved and loaded computes the same.

| in a cell | means |
| --- | --- |
| yes | right |
| refused | a clear error: tokens have no gradient, an attack needs a classifier |
| - | does not apply |
| unclear | differences do not converge, as at the kinks of ReLU and max pooling in single precision |
| Keras | Keras or the model itself fails, here mostly at saving; so it does without this package |
| time | stopped after the time for a cell |
| WRONG, CRASH | a defect |
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
