"""The penalty on input gradients: options, targets, function, layer and model. `example_norms.py` has its norms."""
