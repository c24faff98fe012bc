"""Peak memory of one program, in a process of its own: what a run needs beyond what it starts with.

For Linux.
The kernel's own record of the most that the process ever held (VmHWM) is set back after the warm-up, so that
neither the imports nor the compiler count.
"""

import argparse
import ctypes
import pathlib
import subprocess
import sys

RUNS = 5
_STATUS, _RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def compare(row, mode, model, batch):
    """Returns the MiB that ours and the hand-written code need."""
    arguments = [row.name, mode, model, str(batch)]
    ours, theirs = (_in_own_process(side, arguments) for side in ("ours", "theirs"))
    return {
        "row": row.name,
        "mode": mode,
        "model": model,
        "batch": batch,
        "ours_mib": ours,
        "theirs_mib": theirs,
        "ratio": round(ours / theirs, 3) if theirs else None,
    }


def _in_own_process(side, arguments):
    command = [sys.executable, "-m", "benchmarks.memory", side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def _held(key):
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def _main():
    from benchmarks import measure_backend

    parser = argparse.ArgumentParser()
    for name in ("side", "row", "mode", "model", "batch"):
        parser.add_argument(name)
    options = parser.parse_args()
    by_hand = measure_backend.reference()
    by_hand.use_one_thread()
    row, mode, model, batch = next(
        case
        for case in measure_backend.cases(options.row)
        if (case[0].name, *case[1:]) == (options.row, options.mode, options.model, int(options.batch))
    )
    ours, theirs = measure_backend.prepare(row, mode, model, batch)
    run = ours if options.side == "ours" else theirs
    for _ in range(3):
        by_hand.block(run())

    # What the allocator has kept from the warm-up would hide what a run asks for.
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    before = _held("VmRSS")
    for _ in range(RUNS):
        by_hand.block(run())
    print(round(_held("VmHWM") - before, 1))


if __name__ == "__main__":
    _main()
