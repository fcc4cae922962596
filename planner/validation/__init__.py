"""Predictions held against what others measured: runs, kernels and collectives, one row of a file at a time."""

from planner.validation.report import Report, validate
from planner.validation.scores import ScoredRow

__all__ = ["Report", "ScoredRow", "validate"]
