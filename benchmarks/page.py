"""The text of docs/benchmarks.md: ten figures, with pictures."""

from benchmarks import differential_operators, figures, summary, tables
from benchmarks.run import BACKENDS
from benchmarks.three_backends import section

PAGE = """# Benchmarks

How much slower is this package than code that an expert writes by hand for one framework? Compiled, on TensorFlow and
JAX, it is as fast, within a few percent.

On PyTorch, it is {least} to {most} slower if both run eagerly. Compiled, it takes {replayed} (recorded operations are
run again) or {inductor} (inductor) of the time of eager hand-written code. If the expert also compiles that code by
inductor, it takes {both} of its time. The last three figures are medians.

These ten figures were measured on {cpu} with one thread. Figures 1 to 5 are our time divided by that of
hand-written code. [The tables](benchmark_tables.md) have all measurements, with quartiles, and say how they were made.
The commands at the end of this page repeat the measurements.

{table}

## Overhead

Both sides compute the same values on the same model, in alternating runs of one process. The bars are medians over the
models, and 1 means that the package costs nothing. On PyTorch, our products over a data set are compiled automatically,
and the hand-written ones run eagerly.

{overhead}

TensorFlow's guide "Advanced automatic differentiation" computes Jacobians and Hessians eagerly, and traces its
vectorized loops at every call. The same functions of this package are compiled and cached. On the guide's own models:

{guide}

{three_backends}## PyTorch, compiled

The table shows the time of this package on PyTorch, divided by that of hand-written code, as the median over the
models. The columns:

- *eager*: both sides run eagerly.
- *replayed*: our code is compiled by `kg.jit`, automatically by a transform, or by `jit_compile=True`: recorded
  operations are run again. The hand-written code runs eagerly.
- *inductor*: our code is compiled by inductor. The hand-written code runs eagerly and does not use Keras.
- *inductor, both*: as above, but the hand-written code, without Keras, is traced by `make_fx` and compiled by inductor.

Small models gain most. In these rows, the hand-written code takes at least 5 ms.

{compiled_on_torch}

## What derivatives cost

A product with the Hessian costs about two gradients, whatever the size of the model. Further products at the same
point cost less, because they share the recorded operations. In `fit`, a penalty on input gradients about doubles the
time of a training step.

{costs}

## Laplacians of many axes, and derivatives of high order

The network has three layers of 64 units with tanh, and gets 128 examples. Times are multiples of the time of one
evaluation of the network, which is timed alternately with the derivative. The exponent is the slope of the logarithms:
1 means linear growth. Small chunks of axes also take less time here. On JAX, whose compiler merges repeated work,
nested `jvp` is still faster at order 4. TensorFlow keeps the memory of a program between calls, so its peak was not
measured.

{operators}

## Second-order training

Each point is one seed. Both methods start from the same weights and train in `fit` for the same wall-clock time. Adam
uses the best of ten combinations of learning rate and decay. The left plot shows the squared error of a 1-20-1 network
that fits sin(10 pi x) / (10 pi x). The right plot shows the norm of the gradient of a digit classifier, which measures
convergence, not accuracy on test data. [Training by second-order methods](second_order.md) says which method suits
which task.

{training}

## Monitors

A monitor measures on a few examples at the end of an epoch. The bars show the cost of a measurement on 8 examples, as a
fraction of an epoch of `make demo`, which has only 1,297 examples. The cost does not depend on the size of the training
set: with 50,000 examples, the fraction is forty times smaller.

{monitors}

## Repeat the measurements

| command | measures |
| --- | --- |
| `make bench`, `make bench BACKEND=jax` | times, compared with hand-written code |
| `python -m benchmarks.three_backends` | times of the three backends, with all their compilers, side by side |
| `python -m benchmarks.run --memory` | memory |
| `python -m benchmarks.growth` | growth of time and memory of Jacobians |
| `python -m benchmarks.differential_operators` | growth of Laplacians and of derivatives of high order |
| `python -m benchmarks.curvature_modes`, `curvature_memory`, `traces` | curvature |
| `python -m benchmarks.second_order` | second-order training |
| `python -m benchmarks.large_model` | second-order steps with a million weights |
| `python -m benchmarks.lbfgs_step`, `quasi_newton` | steps and evaluations of L-BFGS, compared with SciPy's |
| `python -m benchmarks.monitor_cost` | monitors, as a fraction of an epoch |
| `python -m benchmarks.report` | writes this page, its figures and the tables from `benchmarks/results/` |

[Robustness](robustness.md) has the study of robust training, and [penalties](penalties.md) that of kinks.
"""
ALT = {
    "overhead": "Our time over that of hand-written code, by task and backend: the figures of the table above",
    "guide": "How many times faster than the code of TensorFlow's guide",
    "costs": "Costs of products in gradients, and of penalties in plain training steps",
    "training": "Errors after second-order training and after Adam in the same time, for three seeds on each backend",
    "monitors": "Cost of one measurement of each monitor, in percent of an epoch",
}


def picture(name):
    """A figure as Markdown, for light and for dark pages."""
    return "\n\n".join(
        f"```{{image}} _static/benchmarks_{name}_{style}.svg\n:alt: {ALT[name]}\n:class: only-{style}\n```"
        for style in figures.TEXT
    )


def text():
    """The text of docs/benchmarks.md."""
    *_, (_, _, replayed, inductor, both) = summary.compiled_on_torch()
    eager = [e["ratio"] - 1 for row in summary.TASKS for e in summary.of_row("torch", row) if e["mode"] == "eager"]
    return PAGE.format(
        least=f"{min(eager):.0%}",
        most=f"{max(eager):.0%}",
        replayed=f"{replayed:.2f}",
        inductor=f"{inductor:.2f}",
        both=f"{both:.2f}",
        cpu=summary.read("jax", "gradients")["machine"]["cpu"],
        table=tables.markdown(
            ("", *map(summary.label, BACKENDS)),
            [(f"{n}. {what}", *row) for n, (what, row) in enumerate(summary.ten_figures(), 1)],
        ),
        three_backends=section.text(),
        compiled_on_torch=tables.markdown(
            ("", *summary.ON_TORCH),
            [
                (name, *("" if r is None else f"{r:.2f}" for r in ratios))
                for name, *ratios in summary.compiled_on_torch()
            ],
        ),
        operators=tables.markdown(*differential_operators.table()),
        **{name: picture(name) for name in figures.FIGURES},
    )
