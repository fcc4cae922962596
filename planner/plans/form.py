"""The form of a plan's JSON: held against the published schema when a plan is read, so that no later code meets a wrong type.

The schemas, ``plan_schema.json`` here and in ``serving``, are what ``planner schema`` prints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from planner.errors import Problem, SpecError

__all__ = ["SCHEMA_VERSION", "known_fields", "read_form"]

T = TypeVar("T")

SCHEMA_VERSION = "1.0"


def read_form(data: Mapping[str, Any], where: str, package: str, build: Callable[[], T]) -> T:
    """What ``build`` makes of a plan's JSON fields once they have the form of the schema that ``package`` publishes.

    Raises:
        SpecError: the schema's major version is another, a field is missing or wrong, or ``build`` finds that fields contradict
            each other (a ``ValueError``).
    """
    wanted = SCHEMA_VERSION.partition(".")[0]
    if str(data.get("schema_version", "")).partition(".")[0] != wanted:
        raise SpecError(
            Problem(f"{where}: schema_version", repr(data.get("schema_version")), f"major version {wanted}")
        )
    for key, value in _numbers(data):
        if not math.isfinite(value):
            raise SpecError(Problem(f"{where}: {key}", repr(value), "a finite number", _TRY))
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(package)(data)
        return build()
    except JsonSchemaValueException as error:
        key = ".".join(error.path[1:])
        expected = error.message.removeprefix(error.name or "").strip().removeprefix("must be ")
        raise SpecError(
            Problem(f"{where}: {key}" if key else where, _shown(error.value), expected, _TRY)
        ) from None
    except ValueError as error:
        raise SpecError(Problem(where, str(error), "a plan that agrees with itself", _TRY)) from None


def known_fields(data: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The entries that the class has fields for: those of later minor versions are ignored."""
    names = cls.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: value for name, value in data.items() if name in names}


_TRY = "Have it written again by planner train, estimate or serve."


@cache
def _validator(package: str) -> Callable[[Mapping[str, Any]], Any]:
    import fastjsonschema

    schema = json.loads((files(package) / "plan_schema.json").read_text(encoding="utf-8"))
    found: Callable[[Mapping[str, Any]], Any] = fastjsonschema.compile(
        {**schema["$defs"]["plan"], "$defs": schema["$defs"]}, use_default=False
    )
    return found


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key.lstrip("."), value
    elif isinstance(value, Mapping | list):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, entry in entries:
            yield from _numbers(entry, f"{key}.{name}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
