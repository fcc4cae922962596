"""Techniques of the slot ``recompute``."""
