"""The one type of the cost formulas: a number, or an array of them that broadcasts."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Real"]

# Formulas are plain arithmetic, so that a notebook can call them with numbers and the search with a million
# rows: numbers in give a float out, arrays in give the broadcast array.
Real: TypeAlias = float | np.floating[Any] | npt.NDArray[Any]
