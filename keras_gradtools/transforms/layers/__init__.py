"""Derivatives of a wrapped layer as layers, one public class in each file."""
