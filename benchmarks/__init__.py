"""Benchmarks of the package against hand-written code for each framework: `make bench`."""
