"""Techniques of the slot ``expert_overlap``."""
