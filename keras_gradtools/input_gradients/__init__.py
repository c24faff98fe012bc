"""The penalty on input gradients: norms, targets, function, layer and model."""
