"""Ranges that the numbers of a job may lie in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.errors import Problem

__all__ = ["out_of_range"]


def out_of_range(spec: Any, limits: Mapping[str, tuple[float, float, bool]]) -> list[Problem]:
    """Every field of a specification that is given and lies outside its range.

    Args:
        spec: whose fields they are; None means not given.
        limits: least and most by field, and whether it has to be a whole number.
    """
    return [
        Problem(name, repr(value), f"a {'whole number' if whole else 'number'} from {least:,} to {most:,}")
        for name, (least, most, whole) in limits.items()
        if (value := getattr(spec, name)) is not None and not _inside(value, least, most, whole=whole)
    ]


def _inside(value: object, least: float, most: float, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value) and least <= value <= most
