"""The one type of the cost formulas, a number or an array of them that broadcasts; and the distinct values of an array."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Real", "distinct"]

# Formulas are plain arithmetic, so that a notebook can call them with numbers and the search with a million
# rows: numbers in give a float out, arrays in give the broadcast array.
Real: TypeAlias = float | np.floating[Any] | npt.NDArray[Any]


def distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Distinct numbers of an array, sorted: ``np.unique`` without the masked arrays that it loads, which take as long as a search
    has for a whole prefix.

    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    ordered = np.sort(values, axis=None)
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    found: npt.NDArray[Any] = ordered[first]
    return found
