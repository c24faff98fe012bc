"""Custom gradients, and the stock ones that stop, clip, scale, reverse or replace a gradient."""
