"""Measures the package against hand-written code of each framework; `make bench` runs it."""
