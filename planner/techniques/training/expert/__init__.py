"""Techniques of the slot ``expert``."""
