"""Solvers of linear systems with a symmetric matrix: conjugate gradients, and a damped Cholesky factorization."""
