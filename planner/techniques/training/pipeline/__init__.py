"""Techniques of the slot ``pipeline``."""
