"""Training of physics-informed networks by several optimizers: see `benchmarks/pde/__main__.py`."""
