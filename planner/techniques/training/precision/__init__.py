"""Techniques of the slot ``precision``."""
