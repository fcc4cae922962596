"""Techniques of the slot ``attention_kernel``."""
