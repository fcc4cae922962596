"""Techniques of the slot ``context``."""
