"""Techniques of a training step, one folder per slot."""
