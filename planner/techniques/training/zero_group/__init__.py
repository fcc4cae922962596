"""Techniques of the slot ``zero_group``."""
