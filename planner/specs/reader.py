"""Strict reading of TOML and JSON tables: every problem of a file is collected, and raised at once.

A :class:`Reader` wraps one table. Each typed getter takes a key, checks its value and notes a problem instead of
raising, so that one error shows all of them; :meth:`Reader.finish` adds the keys that nobody asked for.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError, did_you_mean
from planner.units import parse_bytes

__all__ = ["REQUIRED", "Reader", "read_file"]


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
_MAX_FILE_BYTES = 64 * 2**20


def read_file(path: str | Path) -> dict[str, Any]:
    """The table in a ``.toml`` or ``.json`` file.

    Raises:
        SpecError: the file is missing, unreadable, malformed, or holds no table.
    """
    path = Path(path)
    where = str(path)
    try:
        if path.is_dir():
            raise SpecError(Problem(where, "is a folder", "a .toml or .json file"))
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise SpecError(
                Problem(where, f"is {path.stat().st_size} bytes", "a specification file under 64 MiB")
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecError(Problem(where, "no such file", "a .toml or .json file", "Check the path.")) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            Problem(where, f"is not UTF-8 text ({error.reason})", "a .toml or .json file")
        ) from None
    except (OSError, ValueError) as error:
        raise SpecError(Problem(where, f"cannot be read ({error})", "a readable file")) from None
    try:
        data = (
            tomllib.loads(text)
            if path.suffix.lower() == ".toml"
            else json.loads(text, parse_constant=_refuse)
        )
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
        raise SpecError(Problem(where, f"is not valid {kind} ({error})", f"a {kind} table")) from None
    if not isinstance(data, dict):
        raise SpecError(Problem(where, f"holds a {type(data).__name__}", "a table (an object)"))
    return data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


class Reader:
    """Typed, strict access to one table; problems of all nested readers are collected in one list.

    Args:
        data: the table.
        where: the file (or other origin) that problems name.
        path: the key path of this table inside the file.
    """

    def __init__(
        self, data: Mapping[str, Any], where: str, path: str = "", problems: list[Problem] | None = None
    ) -> None:
        self.data = data
        self.where = where
        self.path = path
        self.problems: list[Problem] = [] if problems is None else problems
        self._seen: set[str] = set()

    # -- typed getters: each returns a usable value even after a problem, so that reading goes on ---------------

    def text(self, key: str, default: Any = REQUIRED, *, choices: Iterable[str] | None = None) -> Any:
        """A string; with ``choices``, one of them."""
        value = self._get(key, default, str, "a string")
        if choices is not None and isinstance(value, str) and key in self.data:
            known = sorted(choices)
            if value not in known:
                self.problem(key, repr(value), f"one of {', '.join(known)}", did_you_mean(value, known))
        return value

    def boolean(self, key: str, default: Any = REQUIRED) -> Any:
        """``true`` or ``false``."""
        return self._get(key, default, bool, "true or false")

    def integer(self, key: str, default: Any = REQUIRED, *, minimum: int = 1, maximum: int = 10**15) -> Any:
        """A whole number between ``minimum`` and ``maximum``."""
        value = self._get(key, default, int, "a whole number")
        return self._bounded(key, value, default, minimum, maximum)

    def number(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        minimum: float = 0.0,
        maximum: float = 1e30,
        positive: bool = False,
    ) -> Any:
        """A finite number between ``minimum`` and ``maximum``; ``positive`` excludes zero."""
        value = self._get(key, default, (int, float), "a number")
        if positive and key in self.data and isinstance(value, int | float) and value == 0:
            self.problem(key, "0", "a positive number")
            return default if default is not REQUIRED else 1.0
        value = self._bounded(key, value, default, minimum, maximum)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    def size(self, key: str, default: Any = REQUIRED) -> Any:
        """Bytes: a number, or text such as ``"80 GiB"``."""
        value = self._get(key, default, (int, float, str), "a size such as '80 GiB'")
        if isinstance(value, str) and key in self.data:
            try:
                value = parse_bytes(value)
            except ValueError as error:
                self.problem(key, str(error), "a size such as '80 GiB'")
                return 1.0
        value = self._bounded(key, value, default, 0, 1e30)
        return float(value) if isinstance(value, int | float) else value

    def numbers(self, key: str, default: Any = REQUIRED) -> Any:
        """A list of finite numbers, as a tuple."""
        value = self._get(key, default, list, "a list of numbers")
        if not isinstance(value, list):
            return value
        if not all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
        ):
            self.problem(key, repr(value)[:80], "a list of finite numbers")
            return ()
        return tuple(float(v) for v in value)

    def texts(self, key: str, default: Any = REQUIRED) -> Any:
        """A list of strings, as a tuple."""
        value = self._get(key, default, list, "a list of strings")
        if not isinstance(value, list):
            return value
        if not all(isinstance(v, str) for v in value):
            self.problem(key, repr(value)[:80], "a list of strings")
            return ()
        return tuple(value)

    def table(self, key: str, default: Any = REQUIRED) -> Any:
        """A nested table as a reader; ``None`` when absent and not required."""
        value = self._get(key, default, dict, "a table")
        if isinstance(value, dict):
            return Reader(value, self.where, self._key(key), self.problems)
        return Reader({}, self.where, self._key(key), self.problems) if default is REQUIRED else default

    def tables(self, key: str, default: Any = REQUIRED) -> list[Reader]:
        """A list of nested tables as readers."""
        value = self._get(key, default, list, "a list of tables")
        readers: list[Reader] = []
        for index, row in enumerate(
            value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        ):
            if isinstance(row, dict):
                readers.append(Reader(row, self.where, f"{self._key(key)}[{index}]", self.problems))
            else:
                self.problem(f"{key}[{index}]", repr(row)[:80], "a table")
        return readers

    def has(self, key: str) -> bool:
        """Whether the table has this key (and it is not null)."""
        return self.data.get(key) is not None

    def keys(self) -> list[str]:
        """The table's keys, in order."""
        return list(self.data)

    def ignore(self, *keys: str) -> None:
        """Marks keys as known, though nothing is read from them."""
        self._seen.update(keys)

    # -- problems ------------------------------------------------------------------------------------------------

    def problem(self, key: str, found: str, expected: str = "", try_: str = "") -> None:
        """Notes a problem at ``key`` of this table."""
        self.problems.append(Problem(f"{self.where}: {self._key(key)}", found, expected, try_))

    def refuse(self, unmodelled: Mapping[str, str]) -> None:
        """Notes every key that asks for what is not modelled (key → what); tables may be there and not enabled."""
        for key, what in unmodelled.items():
            value = self.data.get(key)
            if value and not (isinstance(value, Mapping) and value.get("enabled") is False):
                self.problem(key, f"{what}: not modelled")

    def finish(self) -> None:
        """Notes every key that no getter asked for."""
        for key in self.data:
            if key not in self._seen:
                hint = did_you_mean(key, self._seen)
                self.problem(
                    key, "unknown key", f"one of {', '.join(sorted(self._seen))}" if not hint else "", hint
                )

    def raise_if_any(self) -> None:
        """Raises all noted problems as one :class:`SpecError`."""
        if self.problems:
            raise SpecError(self.problems)

    # -- details -------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _get(self, key: str, default: Any, kind: type | tuple[type, ...], expected: str) -> Any:
        self._seen.add(key)
        if key not in self.data:
            if default is REQUIRED:
                self.problem(key, "is missing", expected)
                return _blank(kind)
            return default
        value = self.data[key]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or wrong_bool:
            self.problem(key, f"{value!r:.80} ({type(value).__name__})", expected)
            return _blank(kind) if default is REQUIRED else default
        return value

    def _bounded(self, key: str, value: Any, default: Any, minimum: float, maximum: float) -> Any:
        if key not in self.data or not isinstance(value, int | float):
            return value
        if not (math.isfinite(value) and minimum <= value <= maximum):
            self.problem(key, repr(value), f"a number from {minimum:g} to {maximum:g}")
            return minimum if default is REQUIRED else default
        return value


def _blank(kind: type | tuple[type, ...]) -> Any:
    """A value of the kind, so that reading can go on to the next problem."""
    first = kind[0] if isinstance(kind, tuple) else kind
    return {str: "", bool: False, int: 1, float: 1.0, list: [], dict: {}}[first]
