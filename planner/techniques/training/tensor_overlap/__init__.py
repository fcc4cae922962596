"""Techniques of the slot ``tensor_overlap``."""
