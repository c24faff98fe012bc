"""A loss over batches of data: its sums, its random numbers and its repeatability."""
