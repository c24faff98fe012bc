"""Linear systems with a symmetric operator."""
