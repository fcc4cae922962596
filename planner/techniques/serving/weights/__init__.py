"""Techniques of the slot ``weights``."""
