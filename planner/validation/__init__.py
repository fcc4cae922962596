"""Predictions held against what others measured: runs, kernels and collectives, one row of a file at a time."""
