"""Curvature matrices as operators, which are known by their products."""
