"""Techniques of a serving pool, one folder per slot."""
