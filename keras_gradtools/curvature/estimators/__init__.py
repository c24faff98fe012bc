"""Spectra, traces, diagonals and loss surfaces of any symmetric operator, one estimator in each file."""
