"""Techniques of the slot ``adapters``."""
