"""Techniques of the slot ``shards``."""
