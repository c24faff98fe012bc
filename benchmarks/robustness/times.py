"""The time of a training step of each method of the robustness study, in pairs with a plain step."""

import json

from benchmarks.robustness import methods
from benchmarks.run import RESULTS
from benchmarks.timing import compare

FOR_SECONDS = 6.0


def measure(chosen):
    import keras

    (x, y), _ = methods.data()
    batch = x[: methods.BATCH_SIZE], y[: methods.BATCH_SIZE]
    plain = {m.activation: methods.compiled(m, 0, len(x))[1] for m in chosen if m.kind == "plain"}
    times = {}
    for method in chosen:
        if method.kind == "plain":
            continue
        _, trained = methods.compiled(method, 0, len(x))
        other = plain[method.activation]
        for warm in (trained, other) * 5:
            warm.train_on_batch(*batch)
        # There is nothing to wait for: `train_on_batch` returns Python numbers.
        found = compare(
            lambda: trained.train_on_batch(*batch),  # noqa: B023
            lambda: other.train_on_batch(*batch),  # noqa: B023
            lambda result: None,
            for_seconds=FOR_SECONDS,
        )
        times[method.name] = {
            "ratio": found.ratio,
            "surely_above": found.surely_above,
            "surely_below": found.surely_below,
            "ms": found.ours_ms,
            "plain_ms": found.theirs_ms,
        }
        print(f"{method.name}: {found.ratio:.2f} plain steps ({found.ours_ms:.1f} ms against {found.theirs_ms:.1f} ms)")
    path = RESULTS / f"robustness_times_{keras.backend.backend()}.json"
    path.write_text(json.dumps(times, indent=1) + "\n")
    print(f"Wrote {path.name}")
