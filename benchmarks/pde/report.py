"""The tables and the picture of docs/pde.md."""

import statistics

from benchmarks.pde import runs
from benchmarks.pde.problems import PROBLEMS
from benchmarks.run import ROOT

PAGE, PICTURE = ROOT / "docs" / "pde.md", ROOT / "docs" / "pde.png"
BEGIN, END = "<!-- The tables: python -m benchmarks.pde --report -->", "<!-- End of the tables -->"
TITLES = {"jax": "JAX", "torch": "torch", "tensorflow": "TensorFlow"}
BASELINES = ("Adam", "Adam, then SciPy's L-BFGS")
# The best of our methods is to be so many times below each baseline, on this many problems.
GOALS, PROBLEMS_OF_GOAL = {"Adam": 100.0, "Adam, then SciPy's L-BFGS": 10.0}, 5


def final_errors(backend):
    """The final errors of all seeds, by problem and method, of the problems for which no method is missing."""
    found: dict = {}
    for r in runs.results_of(backend):
        if not r["is_tuning"]:
            found.setdefault(r["problem"], {}).setdefault(r["method"], []).append(r["errors"][-1])
    count = max(map(len, found.values()), default=0)
    return {problem: errors for problem, errors in found.items() if len(errors) == count}


def is_ours(method):
    return method not in BASELINES and "torch" not in method


def table(backend):
    errors = final_errors(backend)
    methods = list(dict.fromkeys(m for of_problem in errors.values() for m in of_problem))
    shown = [p for p in PROBLEMS if p.name in errors]
    lines = ["| method | " + " | ".join(p.title for p in shown) + " |", "| --- |" + " ---: |" * len(shown)]
    best = {p.name: min(map(statistics.median, errors[p.name].values())) for p in shown}
    for method in methods:
        cells = []
        for p in shown:
            values = errors[p.name].get(method)
            text = f"{statistics.median(values):.1e}" if values else ""
            cells.append(f"**{text}**" if values and statistics.median(values) == best[p.name] else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for baseline in BASELINES:
        cells = []
        for p in shown:
            ours = [statistics.median(v) for m, v in errors[p.name].items() if is_ours(m)]
            theirs = errors[p.name].get(baseline)
            cells.append(f"{statistics.median(theirs) / min(ours):.3g}" if ours and theirs else "")
        lines.append(f"| *{baseline}, over our best* | " + " | ".join(cells) + " |")
    counts = [str(min(map(len, errors[p.name].values()))) for p in shown]
    return "\n".join([*lines, "| *seeds* | " + " | ".join(counts) + " |"])


def goals(backend):
    errors, lines = final_errors(backend), []
    for baseline, factor in GOALS.items():
        ratios = []
        for of_problem in errors.values():
            ours = [statistics.median(v) for m, v in of_problem.items() if is_ours(m)]
            if ours and baseline in of_problem:
                ratios.append(statistics.median(of_problem[baseline]) / min(ours))
        met = sum(r >= factor for r in ratios)
        is_open = len(ratios) < len(PROBLEMS) and met + len(PROBLEMS) - len(ratios) >= PROBLEMS_OF_GOAL
        verdict = "met" if met >= PROBLEMS_OF_GOAL else "not all measured" if is_open else "missed"
        lines.append(
            f"- {TITLES[backend]}: our best is at least {factor:g} times below {baseline} on {met} of {len(ratios)} "
            f"problems (goal: {PROBLEMS_OF_GOAL} of {len(PROBLEMS)}): {verdict}."
        )
    poisson = [statistics.median(v) for m, v in errors.get("poisson_2d", {}).items() if is_ours(m)]
    if poisson:
        verdict = "met" if min(poisson) <= 1e-6 else "missed"
        lines.append(f"- {TITLES[backend]}: error of Poisson, 2D: {min(poisson):.1e} (goal: 1e-6): {verdict}.")
    return lines


def draw(backend):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from keras_gradtools.drawing.styles import series_style

    results = [r for r in runs.results_of(backend) if not r["is_tuning"]]
    methods = list(dict.fromkeys(r["method"] for r in results))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained", sharex=True)
    for ax, problem in zip(axes.flat, PROBLEMS, strict=True):
        ax.set_yscale("log")
        for number, method in enumerate(methods):
            of_method = [r for r in results if r["problem"] == problem.name and r["method"] == method]
            for i, r in enumerate(of_method):
                style = {k: v for k, v in series_style(number).items() if k != "marker"}
                ax.plot(r["seconds"], r["errors"], label=method if i == 0 else None, linewidth=1.3, **style)
        ax.set_title(problem.title)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("CPU seconds of training")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative L2 error")
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes.flat), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=100)
    pyplot.close(figure)


def write():
    backends = [b for b in TITLES if final_errors(b)]
    parts = [f"### {TITLES[backend]}\n\n{table(backend)}" for backend in backends]
    text = "\n\n".join([*parts, "### Goals", "\n".join(line for b in backends for line in goals(b))])
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    draw(backends[0])
    print(f"Wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
