"""A report on a trained or untrained model: what is wrong with its derivatives, and what to do."""
