"""Techniques of the slot ``optimizer``."""
