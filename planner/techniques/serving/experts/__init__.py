"""Techniques of the slot ``experts``."""
