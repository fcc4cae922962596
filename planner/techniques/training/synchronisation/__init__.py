"""Techniques of the slot ``synchronisation``."""
