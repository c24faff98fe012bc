"""Draws the bar charts of docs/benchmarks.md, for light and for dark pages: `python -m benchmarks.figures`."""

import numpy as np

from benchmarks import summary
from benchmarks.run import BACKENDS, ROOT

FOLDER = ROOT / "docs" / "_static"
# Colors of Okabe and Ito. Hatches and the labels of the bars tell them apart without color.
LOOKS = {
    "tensorflow": {"color": "#e69f00", "hatch": ""},
    "jax": {"color": "#0072b2", "hatch": "//"},
    "torch": {"color": "#d55e00", "hatch": ".."},
}
TEXT = {"light": "#222832", "dark": "#ced6dd"}


def draw_groups(ax, groups, values, text, unit=""):
    """Horizontal bars in groups: `values[backend]` has one value for each group."""
    height = 0.8 / len(values)
    at = np.arange(len(groups))
    for n, (backend, bars) in enumerate(values.items()):
        drawn = ax.barh(at + n * height, bars, height * 0.9, label=summary.label(backend), **LOOKS[backend])
        ax.bar_label(drawn, [text(value) for value in bars], padding=3, fontsize=9)
    ax.set_yticks(at + 0.4 - height / 2, groups)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.spines[["top", "right"]].set_visible(False)


def overhead(figure):
    ax = figure.subplots()
    values = {b: [summary.ratio(b, row) for row in summary.TASKS] for b in BACKENDS}
    draw_groups(ax, list(summary.TASKS.values()), values, "{:.2f}".format, "our time / time of hand-written code")
    ax.axvline(1, color="gray", linewidth=1)
    ax.set_xlim(0, 1.45)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


def guide(figure):
    ax = figure.subplots()
    speedups = summary.guide_speedups()
    values = {"tensorflow": list(speedups.values())}
    draw_groups(ax, list(speedups), values, "{:.0f} times".format, "times faster than the guide's code, on TensorFlow")
    ax.set_xlim(0, 1.2 * max(speedups.values()))


def costs(figure):
    left, right = figure.subplots(1, 2)
    for ax, rows, unit in (
        (left, summary.PRODUCTS, "cost in gradients"),
        (right, summary.PENALTIES, "cost of a training step, in plain steps"),
    ):
        values = {b: [summary.ratio(b, row) for row in rows] for b in BACKENDS}
        draw_groups(ax, list(rows.values()), values, "{:.1f}".format, unit)
        ax.set_xlim(0, 3.2)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)


def training(figure):
    ways = {"second order": ("#009e73", "o"), "Adam, same time": ("#cc79a7", "s")}
    for ax, task, title in zip(
        figure.subplots(1, 2),
        ("sinc", "digits"),
        ("Levenberg-Marquardt: squared error of a fit", "NewtonCG: norm of the gradient, digits"),
        strict=True,
    ):
        for at, backend in enumerate(BACKENDS):
            for way, results in zip(ways, zip(*summary.training(backend, task), strict=True), strict=True):
                color, marker = ways[way]
                label = way if at == 0 else None
                ax.plot(results, [at] * len(results), marker, color=color, markersize=8, label=label)
        ax.set(xscale="log", yticks=range(len(BACKENDS)), ylim=(2.5, -0.5), title=title)
        ax.set_yticklabels([summary.NAMES[b] for b in BACKENDS])
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def monitors(figure):
    ax = figure.subplots()
    names = ("BatchJacobianMonitor", "GradientMonitor", "CurvatureMonitor")
    values = {b: [100 * summary.share(b, f"{name}, 8 examples") for name in names] for b in BACKENDS}
    draw_groups(ax, names, values, "{:.0f}%".format, "one measurement, in percent of an epoch of 1,297 digits")
    ax.set_xlim(0, 28)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


FIGURES = {
    "overhead": (overhead, (9, 6.2)),
    "guide": (guide, (9, 2.0)),
    "costs": (costs, (10, 3.6)),
    "training": (training, (10, 2.9)),
    "monitors": (monitors, (9, 3.3)),
}


def main():
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    for name, (draw, size) in FIGURES.items():
        for style, color in TEXT.items():
            colored = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
            options = {"svg.hashsalt": "benchmarks", "font.size": 10.5, "axes.titlesize": 11, "hatch.linewidth": 0.6}
            with pyplot.rc_context(dict.fromkeys(colored, color) | options):
                figure = pyplot.figure(figsize=size, layout="constrained")
                draw(figure)
                path = FOLDER / f"benchmarks_{name}_{style}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
                pyplot.close(figure)
    print(f"Wrote {len(FIGURES)} figures into {FOLDER.relative_to(ROOT)}, for light and for dark pages")


if __name__ == "__main__":
    main()
