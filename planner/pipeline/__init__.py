"""Blocks on stages: layouts, where each stage runs, and the step that they make."""
