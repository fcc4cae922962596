"""Techniques of the slot ``graphs``."""
