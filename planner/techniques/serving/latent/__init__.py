"""Techniques of the slot ``latent``."""
