"""Techniques of the slot ``cache_copies``."""
