"""Techniques of the slot ``prompt_ranks``."""
