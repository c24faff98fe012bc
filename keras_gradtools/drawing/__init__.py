"""Plots of arrays and matrices, and what the plots of all subjects share."""
