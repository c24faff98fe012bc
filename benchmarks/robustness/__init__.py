"""The robustness study, see `python -m benchmarks.robustness --help`."""
