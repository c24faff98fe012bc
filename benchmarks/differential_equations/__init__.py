"""The examples of differential equations, with nested gradients and in one pass: see `__main__.py`."""
