"""Techniques of the slot ``zero_stage``."""
