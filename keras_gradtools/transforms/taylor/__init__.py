"""Forward passes through recorded operations that carry several derivatives of each value at once."""
