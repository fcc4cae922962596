"""YAML as text, for the few shapes that configurations have: maps of maps, lists of values or of maps, and plain values.

Writing needs no library; PyYAML is imported when a file is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.export.launched import read_text

__all__ = ["read_yaml", "yaml_text"]


def yaml_text(value: Mapping[str, Any], indent: str = "") -> str:
    """A map as YAML, in its own order.

    Strings that YAML could read as something else are quoted.

    >>> print(yaml_text({"a": True, "b": {"c": "no", "d": [1, 2]}, "e": [{"f": 1, "g": 2}]}), end="")
    a: true
    b:
      c: "no"
      d: [1, 2]
    e:
      - f: 1
        g: 2
    """
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines.append(f"{indent}{key}:\n{yaml_text(item, indent + '  ')}")
        elif isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item):
            entries = (yaml_text(entry, indent + "    ") for entry in item)
            lines.append(f"{indent}{key}:\n" + "".join(f"{indent}  - {entry.lstrip()}" for entry in entries))
        else:
            lines.append(f"{indent}{key}: {_scalar(item)}\n")
    return "".join(lines)


def read_yaml(path: str | Path, expected: str) -> dict[str, Any]:
    """The map in a YAML file.

    Raises:
        SpecError: the file cannot be read, is no YAML, or holds no map.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    text = read_text(path, expected)
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(Problem(str(path), f"is not valid YAML ({reason})", expected)) from None
    if not isinstance(data, dict):
        raise SpecError(Problem(str(path), f"holds a {type(data).__name__}", f"a map: {expected}"))
    return {str(key): value for key, value in data.items()}


def _scalar(value: Any) -> str:
    if isinstance(value, str) and (value.lower() in _AMBIGUOUS or not value.replace("_", "").isalnum()):
        return json.dumps(value)
    return value if isinstance(value, str) and not value[0].isdigit() else json.dumps(value)


_AMBIGUOUS = frozenset({"", "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"})
