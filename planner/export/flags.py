"""Command-line flags as data: what an exporter writes and an importer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from planner.errors import Problem, SpecError, did_you_mean

__all__ = ["FlagReader", "Flags", "parse_flags", "words"]

Flags = dict[str, list[Any]]
"""Flag (with its dashes) → values; a switch has none."""

_T = TypeVar("_T")
_REQUIRED: Any = object()


def words(flags: Flags) -> list[str]:
    """One text per flag, values included, in order.

    >>> words({"--swiglu": [], "--hidden-dropout": [0.0]})
    ['--swiglu', '--hidden-dropout 0.0']
    """
    return [" ".join((flag, *map(str, values))) for flag, values in flags.items()]


def parse_flags(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Flags of a command line; the last of several wins, as argparse has it.

    >>> parse_flags(["--bf16", "--recompute-modules", "moe", "mlp", "--lr=1e-4"])
    {'--bf16': [], '--recompute-modules': ['moe', 'mlp'], '--lr': ['1e-4']}
    """
    found: dict[str, list[str]] = {}
    flag = ""
    for token in tokens:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            found[flag] = [value] if equals else []
        elif flag:
            found[flag].append(token)
    return found


class FlagReader:
    """Typed access to parsed flags; remembers what was read, and collects problems.

    Args:
        flags: flag → values.
        where: the file that problems name.
    """

    def __init__(self, flags: Mapping[str, list[str]], where: str) -> None:
        self.flags = flags
        self.where = where
        self.problems: list[Problem] = []
        self.read: set[str] = set()

    def present(self, flag: str) -> bool:
        """Whether the flag was given."""
        self.read.add(flag)
        return flag in self.flags

    def integer(self, flag: str, default: Any = _REQUIRED) -> Any:
        """A whole number."""
        return self._value(flag, default, int, "a whole number", 1)

    def number(self, flag: str, default: Any = _REQUIRED) -> Any:
        """A number."""
        return self._value(flag, default, float, "a number", 1.0)

    def text(self, flag: str, default: Any = _REQUIRED) -> Any:
        """One word."""
        return self._value(flag, default, str, "one word", "")

    def choice(self, flag: str, default: str, meanings: Mapping[str, _T]) -> _T:
        """What the flag's word means; a word without a meaning is a problem."""
        value = self.text(flag, default)
        if value not in meanings:
            self.fault(flag, repr(value), f"one of {', '.join(meanings)}", did_you_mean(value, meanings))
            return next(iter(meanings.values()))
        return meanings[value]

    def fault(self, flag: str, found: str, expected: str = "", try_: str = "") -> None:
        """Notes a problem."""
        self.problems.append(Problem(f"{self.where}: {flag}", found, expected, try_))

    def refuse(self, unmodelled: Mapping[str, str], idle: Sequence[str] = ()) -> None:
        """Notes every flag that asks for what is not modelled (flag → what); ``idle`` values ask for nothing."""
        for flag, what in unmodelled.items():
            if self.present(flag) and " ".join(self.flags[flag]) not in idle:
                self.fault(flag, f"{what}: not modelled")

    def raise_if_any(self) -> None:
        """Raises all noted problems as one :class:`SpecError`."""
        if self.problems:
            raise SpecError(self.problems)

    def unread(self) -> list[str]:
        """Flags that nobody asked for, sorted."""
        return sorted(set(self.flags) - self.read)

    def _value(self, flag: str, default: Any, kind: type, expected: str, blank: Any) -> Any:
        self.read.add(flag)
        values = self.flags.get(flag)
        if values is None:
            if default is _REQUIRED:
                self.fault(flag, "is missing", expected)
                return blank
            return default
        try:
            (value,) = values
            return kind(value)
        except ValueError:
            shown = " ".join(values) or "no value (perhaps a variable that only the shell knows)"
            self.fault(flag, shown, expected)
            return blank if default is _REQUIRED or default is None else default
