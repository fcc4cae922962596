"""Techniques of the slot ``loss_kernel``."""
