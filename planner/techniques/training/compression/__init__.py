"""Techniques of the slot ``compression``."""
