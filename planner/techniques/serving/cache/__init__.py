"""Techniques of the slot ``cache``."""
