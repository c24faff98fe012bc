"""Writes docs/benchmarks.md, its figures and docs/benchmark_tables.md: `python -m benchmarks.report`.

It reads the results of the last complete runs, benchmarks/results/.
"""

import json

from benchmarks import figures, page, tables
from benchmarks.run import BACKENDS, RESULTS, ROOT

HEAD = """# Tables of the benchmarks

All measurements behind [benchmarks](benchmarks.md), on the machine named under each heading.

## How to read the tables

The columns:

- *Native* is the hand-written code for the framework, and *ours* is this package, on the same model. Both are checked
  to give the same values, except where they compute different things (*over one gradient*, *over plain step*).
- *Ratio* is our time divided by the native time: 1 means that the package costs nothing. It is the median over *pairs*
  of alternating runs in one process, with quartiles. The first runs, which compile, are left out.
- *CPU ratio* is the same ratio of the CPU time of the process, which other work on the machine affects less.
- *Error* is the largest difference between the two results, divided by the largest entry.
- *Target* is the ratio that we aim for. The last column says whether it is met. *Unsure* means that the target lies
  within the 95% confidence interval of the median.
- The mode *compiled* is `kg.jit` compared with `tf.function` or `jax.jit`. *Self-compiled* is a transform that is
  called directly and compiles automatically, compared with the same. *XLA* is `tf.function(jit_compile=True)` around
  both. *Fit* is `train_on_batch` as Keras compiles it, on torch eager.
- On torch, *replayed* and *fit, replayed* are `kg.jit` and `jit_compile=True`, compared with eager code.
  *Self-compiled* transforms run recorded operations again as well. *Inductor* is compared with eager hand-written code
  without Keras. In *inductor, both*, that code is traced by `make_fx`, since torch's own compiler cannot differentiate
  twice, and compiled by inductor.

The conditions: all runs use one thread. The last runs on TensorFlow and JAX ran side by side, on one core each. Batches
are doubled until the native code takes 5 ms (20 ms where it is one gradient), except in rows with fixed sizes (eager
tape on JAX, training steps, the guide's code, kernel Hessian, dense Hessian).

The rows whose names do not explain themselves:

- *Batch Jacobian*: native is one reverse pass of the whole batch for each output. For *usual code* it is
  `vmap(jacrev)`.
- *Exact step* and *finite-difference step* are training steps with an input-gradient penalty. Native is an equivalent
  hand-written `train_step`. For *over plain step* it is a step of the same model without the penalty, so the ratio is
  the cost of the penalty.
- *Eager tape on JAX*: native is eager `jax.grad`. The first run of a block differentiates it op by op, and the second
  compiles its derivative. The row measures later runs.
- *Over one gradient*: native is one gradient with respect to the weights (for the batch Jacobian, with respect to the
  inputs), compiled in the same way, so the ratio is the cost in gradients. *Linearized* is each product after the first
  one at the same point.
- *Over the guide's code*: native is the eager code of TensorFlow's guide "Advanced automatic differentiation", on its
  own models. A target of 0.0333 means 30 times faster.
- *Kernel Hessian by pre-activations*: native is the fastest way that we know to compute the same matrix by vectorized
  products, in chunks.
- *Forward over reverse, over reverse twice*: both are ours, for a Hessian-vector product. Above 1, reverse over reverse
  is faster. The default modes follow from this row: forward over reverse on JAX, where the second reverse pass of a
  convolution is expensive, and reverse over reverse on torch and TensorFlow. On TensorFlow the choice matters only
  eagerly.
- *Per-example gradients*: native is `vmap` of the gradient (`tf.vectorized_map`, `torch.func.vmap`).
- *Over a data set* is a product with a curvature operator over four batches, the last of them half as large. Native is
  the same sum of hand-written products. Our time includes a fixed 1 to 2 ms of Python per batch (NumPy to tensors,
  state, sums), which matters for small batches.
- *Dense Hessian* is the Hessian with respect to all 2,410 weights of a digit classifier. Native is vectorized products
  with unit vectors, in the chunks that are fastest for it. Ours computes each block of two variables only once, and is
  exactly symmetric.

What ratios can be expected of *over one gradient*? Counting only the matrix products of Dense layers gives an estimate.
Inside a network, a gradient takes three per layer, a Hessian product eight, a linearized one six, and a Gauss-Newton
product five (seven on torch, which has no forward mode here). In the first layer, they take two, three, two and three.
The MLP has two square layers after a narrower one, which gives 2.5, 1.9 and 1.65 gradients. In the wide MLP, most
weights are in the first layer, so its ratios are lower. Measured ratios can be below the estimate, which leaves out
everything but the matrix products.
"""


def modes_section():
    """The ways to compute a product with a curvature operator, and their costs."""
    head = (
        "backend",
        "model",
        "batch",
        "one tape ms",
        "product ms",
        "gradient ms",
        "one tape / product",
        "product / gradient",
    )
    body = [
        (
            backend,
            e["model"],
            str(e["batch"]),
            *(f"{e[way]:.2f}" for way in ("one_tape_ms", "product_ms", "gradient_ms")),
            f"{e['one_tape_ms'] / e['product_ms']:.2f}",
            f"{e['product_ms'] / e['gradient_ms']:.2f}",
        )
        for backend, path in saved("curvature_modes")
        for e in json.loads(path.read_text())
    ]
    yield (
        "## Curvature: modes\n\nThree times of one curvature operator, with the data in one batch: a product from a "
        "gradient that one tape has recorded for all products (`linearized()`), a compiled product (eager on torch), "
        "and a gradient. On torch the first is much faster than the second, so solvers and estimators use it there."
    )
    yield tables.markdown(head, body)


def memory_section():
    """The peak memory of computing the largest eigenvalue for a model with ten million weights."""
    results = [json.loads(path.read_text()) for _, path in saved("curvature_memory")]
    head = (
        "backend",
        "a gradient MiB",
        *(f"eigsh, {n} restarts MiB" for n in results[0]["by_restarts_mib"]),
        "over a gradient",
        "target",
    )
    body = [
        (
            e["backend"],
            f"{e['gradient_mib']:.0f}",
            *(f"{peak:.0f}" for peak in e["by_restarts_mib"].values()),
            f"{(max(e['by_restarts_mib'].values()) - e['gradient_mib']) / e['weights_mib']:.1f} times the weights",
            str(e["target_in_weights"]),
        )
        for e in results
    ]
    yield (
        f"## Curvature: memory\n\nThe peak memory of a gradient, and of the largest eigenvalue, for a model of "
        f"{results[0]['parameters']:,} weights ({results[0]['weights_mib']} MiB). `eigsh` has a basis of "
        f"{results[0]['basis']} vectors. *Over a gradient* is the additional memory of `eigsh`."
    )
    yield tables.markdown(head, body)


def traces_section():
    """The errors of trace estimates, and how often two standard errors cover them."""
    results = json.loads((RESULTS / "traces.json").read_text())
    head = ("backend", "trace", "method", "error (root mean square)", "within two standard errors")
    body = [
        (
            e["backend"],
            f"{e['trace']:.4g}",
            method,
            f"{e[method]['rms_error']:.3g}",
            f"{e[method]['covered']} of {e['seeds']}",
        )
        for e in results
        for method in ("hutchinson", "hutch++")
    ]
    closer = ", ".join(f"{e['closer']:.1f} ({e['backend']})" for e in results)
    yield (
        f"## Curvature: estimates of a trace\n\nTwo estimators of the trace of a Hessian, with "
        f"{results[0]['matvecs']} products each, for a trained classifier with tanh and 2,410 weights. The error of "
        f"Hutch++ is smaller by a factor of {closer}."
    )
    yield tables.markdown(head, body)


def second_order_section():
    """Second-order training compared with Adam after the same time."""
    results = [e for _, path in saved("second_order") for e in json.loads(path.read_text())]
    head = (
        "backend",
        "task",
        "method",
        "Adam's rate",
        "seed",
        "seconds",
        "steps",
        "products",
        "without preconditioner",
        "second order",
        "at its end",
        "Adam",
        "Adam / second order",
        "target",
    )
    body = [
        (
            e["backend"],
            e["task"],
            e["method"],
            f"{e['adam']['learning_rate']:g}{', decaying' if e['adam']['decays'] else ''}",
            *(str(s["seed"]), f"{s['seconds']:.1f}", str(s["steps"])),
            *(f"{s[key]:,}" if key in s else "" for key in ("products", "products_without_preconditioner")),
            *(f"{s[key]:.1e}" for key in ("second_order", "at_the_end", "adam")),
            f"{ratio:,.0f}" if (ratio := s["adam"] / s["second_order"]) >= 10 else f"{ratio:.1f}",
            f"{e['target']:g}",
        )
        for e in results
        for s in e["seeds"]
    ]
    yield (
        "## Second-order training\n\nSecond-order methods compared with Adam, from the same weights and after the same "
        "wall-clock time in `fit`: `python -m benchmarks.second_order`. The task *sinc* fits sin(10 pi x) / (10 pi x) "
        "by a 1-20-1 network with tanh. Its result is the mean squared error after 60 epochs, and *at its end* after "
        "100. The task *digits* trains a classifier with an l2 penalty, with all data in one batch. Its result is the "
        "norm of the gradient. *Products* are the Hessian-vector products of `NewtonCG`, with and without its "
        "preconditioner. Adam's learning rate and decay are the best of ten combinations on three other seeds. On "
        "TensorFlow and JAX, Adam takes twenty steps in one program."
    )
    yield tables.markdown(head, body)


def monitor_cost_section():
    """The cost of a measurement relative to an epoch of the digits demo."""
    results = [json.loads(path.read_text()) for _, path in saved("monitor_cost")]
    head = ("backend", "way", "monitor", "epoch ms", "measurement ms", "share (quartiles)", "target")
    body = [
        (
            e["backend"],
            row["way"],
            row["monitor"],
            f"{row['epoch_ms']:.0f}",
            f"{row['measurement_ms']:.1f}",
            f"{row['share']:.0%} ({row['quartiles'][0]:.0%} - {row['quartiles'][1]:.0%})",
            f"{e['target']:.0%}{'' if row['share'] <= e['target'] else ' missed'}",
        )
        for e in results
        for row in e["rows"]
    ]
    yield (
        "## Monitors\n\nThe cost of one measurement as a fraction of an epoch of the digits demo: "
        "`python -m benchmarks.monitor_cost`. The epoch has 1,297 examples in 21 steps, trained plainly and with the "
        "penalty. A measurement costs the same for any number of training examples. It depends only on the number of "
        "monitored ones."
    )
    yield tables.markdown(head, body)


def saved(what):
    """Yields each backend that has a result of this kind, and the file of the result."""
    for backend in BACKENDS:
        path = RESULTS / f"{backend}_{what}.json"
        if path.exists():
            yield backend, path


def sections():
    for backend in BACKENDS:
        for what in ("gradients", "curvature", "memory", "growth"):
            path = RESULTS / f"{backend}_{what}.json"
            if path.exists():
                result = json.loads(path.read_text())
                yield f"## {backend}: {what}\n\n{tables.conditions(result)}"
                for caption, head, body in tables.tables(result):
                    yield f"**{caption[0].upper()}{caption[1:]}**\n\n{tables.markdown(head, body)}"


def tables_page():
    """The text of docs/benchmark_tables.md."""
    parts = (sections, modes_section, memory_section, traces_section, second_order_section, monitor_cost_section)
    return "\n\n".join([HEAD.rstrip(), *(text for part in parts for text in part())]) + "\n"


def main():
    for name, text in (("benchmarks", page.text()), ("benchmark_tables", tables_page())):
        path = ROOT / "docs" / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        print(f"Wrote {path.relative_to(ROOT)}")
    figures.main()


if __name__ == "__main__":
    main()
