"""Techniques of the slot ``optimizer_offload``."""
