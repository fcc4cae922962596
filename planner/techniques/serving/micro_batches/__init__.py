"""Techniques of the slot ``micro_batches``."""
