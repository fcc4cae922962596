"""Searches of whole plans, and of parts of them that are optimisation problems of their own."""
