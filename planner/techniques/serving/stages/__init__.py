"""Techniques of the slot ``stages``."""
