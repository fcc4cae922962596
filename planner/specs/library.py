"""Finds the data that ships with the package, and matches the names that people give to it.

An installed wheel carries the data under ``planner/data``; a source checkout (and an editable install) keeps
it in ``hardware_profiles`` and ``models`` at its top.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from planner.errors import Problem, SpecError

__all__ = ["canonical", "hardware_folder", "models_folder", "resolve"]

_PACKAGE = Path(__file__).resolve().parents[1]
_BREAK = re.compile(r"[\s/_-]+")


def hardware_folder() -> Path:
    """The shipped ``hardware_profiles``.

    Raises:
        SpecError: the installation lacks it.
    """
    return _shipped("hardware_profiles")


def models_folder() -> Path:
    """The shipped ``models``.

    Raises:
        SpecError: the installation lacks it.
    """
    return _shipped("models")


def canonical(name: str) -> str:
    """A name as files spell it: lower case, with runs of blanks, ``/``, ``_`` and ``-`` as one ``-``.

    >>> canonical("NVIDIA H100_80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return _BREAK.sub("-", name.strip().lower())


def resolve(name: str, known: Collection[str], aliases: Mapping[str, str]) -> str | None:
    """The known name that ``name`` means, directly or by alias; ``None`` when there is none.

    >>> resolve("H100", ["h100-sxm"], {"h100": "h100-sxm"})
    'h100-sxm'
    """
    spelled = canonical(name)
    spelled = spelled if spelled in known else aliases.get(spelled, spelled)
    return spelled if spelled in known else None


def _shipped(folder: str) -> Path:
    for candidate in (_PACKAGE / "data" / folder, _PACKAGE.parent / folder):
        if candidate.is_dir():
            return candidate
    found = "is missing from this installation"
    raise SpecError(Problem(f"planner/data/{folder}", found, try_="Reinstall the planner package."))
