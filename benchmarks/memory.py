"""The peak memory of a run in a separate process, in addition to the memory held before the run. For Linux only.

The kernel's high-water mark of the process (VmHWM) is reset after the warm-up, so imports and compilation do not count.
"""

import argparse
import ctypes
import gc
import os
import pathlib
import subprocess
import sys
import time

RUNS = 5
_STATUS, _RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def compare(row, mode, model, batch):
    """Returns a dict with the peak memory of our and of the hand-written code in MiB."""
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
    return last_number("benchmarks.memory", side, *arguments)


def last_number(module, *arguments):
    """Runs a module in a separate process and returns the last number that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    # With this threshold, larger tensors go back to the system as soon as they are freed. Otherwise, memory that the
    # allocator keeps, above all for the framework's threads, would hide what a run needs.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def _held(key):
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


# inductor compiles at the third call, and gives back what it needed for that some calls later.
def peak_mib(run, block, warm_ups=8, runs=RUNS):
    """Returns the peak memory of the runs, in MiB, in addition to the memory held after the warm-up."""
    for _ in range(warm_ups):
        block(run())
    gc.collect()
    # JAX frees a result a little later, in a separate thread.
    time.sleep(0.5)
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    before = _held("VmRSS")
    for _ in range(runs):
        block(run())
    return round(_held("VmHWM") - before, 1)


def _main():
    from benchmarks import hand_written
    from benchmarks.cases import cases, prepare

    parser = argparse.ArgumentParser()
    for name in ("side", "row", "mode", "model", "batch"):
        parser.add_argument(name)
    options = parser.parse_args()
    by_hand = hand_written.module()
    by_hand.use_one_thread()
    row, mode, model, batch = next(
        case
        for case in cases("gradients", options.row)
        if (case[0].name, *case[1:]) == (options.row, options.mode, options.model, int(options.batch))
    )
    ours, theirs = prepare(row, mode, model, batch)
    run = ours if options.side == "ours" else theirs
    print(peak_mib(run, by_hand.block))


if __name__ == "__main__":
    _main()
