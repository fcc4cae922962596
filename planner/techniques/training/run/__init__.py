"""Techniques of a whole run: what failures, preemptions and changing lengths make of a plan's step."""
