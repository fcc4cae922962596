"""Techniques of the slot ``sequence_parallel``."""
