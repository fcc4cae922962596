"""Techniques of the slot ``parameter_offload``."""
