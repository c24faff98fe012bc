"""Gradient control as layers, one public class in each file."""
