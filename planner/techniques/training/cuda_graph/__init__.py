"""Techniques of the slot ``cuda_graph``."""
