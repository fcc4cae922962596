"""Techniques of the slot ``schedule``."""
