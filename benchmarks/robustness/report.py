"""The tables and the plot of the robustness study, for docs/robustness.md."""

import json
import statistics

from benchmarks.robustness.methods import SETTINGS, STRENGTH, STRENGTHS
from benchmarks.robustness.runs import chosen, is_same, kept, results_of
from benchmarks.run import BACKENDS, RESULTS, ROOT

PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- The tables: python -m benchmarks.robustness --report -->", "<!-- End of the tables -->"
AT = STRENGTHS.index(STRENGTH)
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}


def records_of(backend):
    """The results with the chosen settings, by name and by seed."""
    found: dict = {}
    for name, method in chosen().items():
        records = [r for r in kept(results_of(backend)) if is_same(r, method, r["seed"])]
        for record in records:
            if any(pgd > fgsm for pgd, fgsm in zip(record["pgd"], record["fgsm"], strict=True)):
                raise ValueError(f"PGD is above FGSM, a sign of masked gradients: {record}")
        if records:
            found[name] = {r["seed"]: r for r in records}
    return found


def shown(values, scale=100, sign=""):
    spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):{sign}.1f}{spread}"


def setting_of(method):
    options = {k: v for k, v in method.options.items() if k not in ("method", "norm", "step_size", "steps")}
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def table(backend):
    path = RESULTS / f"robustness_times_{backend}.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    records, methods = records_of(backend), chosen()
    plain = {m.activation: records[name] for name, m in methods.items() if m.kind == "plain" and name in records}
    lines = [
        "| method | setting | clean | change | FGSM | PGD | gain | time of a step |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in SETTINGS:
        if name not in records:
            continue
        of_seeds = records[name]
        clean = [r["clean"] for r in of_seeds.values()]
        attacked = {kind: [r[kind][AT] for r in of_seeds.values()] for kind in ("fgsm", "pgd")}
        others = plain[methods[name].activation]
        pairs = [seed for seed in of_seeds if seed in others]
        gains = [of_seeds[seed]["pgd"][AT] - others[seed]["pgd"][AT] for seed in pairs]
        changes = [of_seeds[seed]["clean"] - others[seed]["clean"] for seed in pairs]
        is_plain = methods[name].kind == "plain"
        compared = ["", ""] if is_plain else [shown(changes, sign="+"), shown(gains, sign="+")]
        time = f"{times[name]['ratio']:.2f}" if name in times else "1" if is_plain else ""
        lines.append(
            f"| {name} | {setting_of(methods[name])} | {shown(clean)} | {compared[0]} | {shown(attacked['fgsm'])} | "
            f"{shown(attacked['pgd'])} | {compared[1]} | {time} |"
        )
    seeds = len(records["plain"])
    return f"### {TITLES[backend]}, {seeds} seeds\n\n" + "\n".join(lines)


def draw(backend, path):
    """Plots the accuracy over the strength, and over the time of a training step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from keras_gradtools.drawing.styles import series_style

    times = json.loads((RESULTS / f"robustness_times_{backend}.json").read_text())
    records = records_of(backend)
    strengths, at = (0.0, *STRENGTHS), AT + 1
    figure, (curves, prices) = pyplot.subplots(1, 2, figsize=(13, 5.2), layout="constrained", width_ratios=(6, 5))
    for number, (name, of_seeds) in enumerate(records.items()):
        style = series_style(number)
        rows = [[100 * a for a in (r["clean"], *r["pgd"])] for r in of_seeds.values()]
        mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
        curves.plot(strengths, mean, markersize=5, linewidth=1.3, label=name, **style)
        lowest, highest = ([f(column) for column in zip(*rows, strict=True)] for f in (min, max))
        curves.fill_between(strengths, lowest, highest, color=style["color"], alpha=0.1, linewidth=0)
        price = times[name]["ratio"] if name in times else 1.0
        prices.errorbar(
            price,
            mean[at],
            [[mean[at] - lowest[at]], [highest[at] - mean[at]]],
            markersize=7,
            label=name,
            **style,
        )
    curves.set(
        title=f"500 test digits under PGD: mean and range of {len(records['plain'])} seeds",
        xlabel="strength: largest change of a pixel (0 to 1)",
        ylabel="accuracy (%)",
        ylim=(0, 102),
        xlim=(0, STRENGTHS[-1]),
    )
    curves.axvline(STRENGTH, color="0.7", linewidth=1)
    curves.grid(alpha=0.3)
    prices.set(
        title=f"What it costs, at strength {STRENGTH}",
        xlabel="time of a training step, in plain steps",
        ylabel="accuracy under PGD (%)",
        xscale="log",
    )
    ticks = (1, 1.5, 2, 3, 4, 6, 8)
    prices.set_xticks(ticks, [f"{t:g}" for t in ticks])
    prices.minorticks_off()
    prices.grid(alpha=0.3)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write():
    tables = "\n\n".join(table(backend) for backend in BACKENDS if kept(results_of(backend)))
    print(tables)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    draw("jax", ROOT / "docs" / "robustness.png")
    print("\nWrote docs/robustness.md and docs/robustness.png")
