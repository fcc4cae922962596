"""Techniques of the slot ``activation_offload``."""
