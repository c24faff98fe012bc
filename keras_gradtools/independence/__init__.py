"""Tests whether the examples of a batch are independent. If they are not, a batch Jacobian is meaningless."""
