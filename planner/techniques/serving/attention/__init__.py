"""Techniques of the slot ``attention``."""
