"""Techniques of the slot ``tensor``."""
