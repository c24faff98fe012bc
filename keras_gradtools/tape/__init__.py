"""The gradient tape, and what it shares with the transforms: Jacobians by rows or columns, tangents and cotangents."""
