"""Techniques of the slot ``checkpoint_end``."""
