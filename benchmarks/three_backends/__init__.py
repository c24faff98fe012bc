"""The backends side by side: the same works on the same weights and data, timed in turns."""
