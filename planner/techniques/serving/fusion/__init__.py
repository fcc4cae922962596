"""Techniques of the slot ``fusion``."""
