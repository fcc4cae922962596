"""Reads a Hugging Face ``config.json`` as it is, without the transformers package.

:mod:`fields` knows the many names of one quantity, :mod:`families` what a ``model_type`` implies and its
file does not say, :mod:`pattern` which layer is built how, and :mod:`convert` puts the model together.
"""

from planner.specs.huggingface.convert import model_from_config

__all__ = ["model_from_config"]
