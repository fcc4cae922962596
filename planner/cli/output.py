"""What leaves the program: JSON without NaN, files written whole or not at all, and errors."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from planner.errors import PlannerError, Problem, SpecError

__all__ = [
    "BUG",
    "INTERRUPTED",
    "PIPE_CLOSED",
    "OutputFile",
    "Stopped",
    "json_text",
    "plans_file",
    "print_json",
    "report_bug",
    "report_error",
    "report_interruption",
]

BUG, INTERRUPTED, PIPE_CLOSED = 70, 130, 141
"""Exit codes beside those of :class:`~planner.errors.PlannerError`."""
_NO_PLANS = (".toml", ".yaml", ".yml", ".csv", ".sh", ".svg")
"""Endings that other readers believe."""


def json_text(value: Any) -> str:
    """The value as indented JSON; a number that is not finite becomes null.

    >>> json_text({"gap": float("nan")})
    '{\\n "gap": null\\n}'
    """
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def print_json(value: Any) -> None:
    """Writes JSON to stdout."""
    sys.stdout.write(json_text(value) + "\n")


def report_error(error: PlannerError, as_json: bool) -> None:
    """The error on stderr for people, or on stdout as JSON."""
    if as_json:
        print_json(error.as_dict())
        return
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)


def report_bug(error: Exception, as_json: bool) -> None:
    """Says that the fault is ours, and how to see where."""
    message = f"{type(error).__name__}: {error}"
    hint = "Set PLANNER_TRACEBACK=1 to see where it happened."
    if as_json:
        problem = Problem("planner", message, try_=hint)
        print_json({"error": {"kind": "internal", "problems": [problem.as_dict()]}})
    print(f"internal error, not your mistake: {message}\n{hint}", file=sys.stderr)


def report_interruption(found: str, as_json: bool = False) -> None:
    """Says that the user stopped the program, and what there is to show for it."""
    if as_json:
        print_json({"error": {"kind": "interrupted", "problems": [Problem("planner", found).as_dict()]}})
    print(f"interrupted: {found}", file=sys.stderr)


class Stopped(Exception):
    """The user pressed Ctrl-C, and a command says what there is to show for it; ``printed``: it is on stdout already."""

    def __init__(self, found: str, printed: bool = False) -> None:
        self.found, self.printed = found, printed
        super().__init__(found)


def plans_file(path: str | None) -> AbstractContextManager[OutputFile | None]:
    """The file that plans are written to as JSON; None without a path.

    Raises:
        SpecError: its name says that it holds something else.
    """
    if path is None:
        return nullcontext()
    if path.lower().endswith(_NO_PLANS):
        hint = "planner export writes launchers' files."
        raise SpecError(
            Problem(f"-o {path!r}", "plans are written as JSON", "a name such as plans.json", hint)
        )
    return OutputFile(path)


class OutputFile:
    """A file that appears whole or not at all; that it can be written is tried at the start.

    Raises:
        SpecError: the path cannot be written.
    """

    def __init__(self, path: str, flag: str = "-o") -> None:
        self._where = f"{flag} {path!r}"
        try:
            self.path = Path(os.path.realpath(Path(path).expanduser()))
            self._draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        except (ValueError, RuntimeError) as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> OutputFile:
        if self.path.exists() and not self.path.is_file():
            kind = "is a folder" if self.path.is_dir() else "is no regular file"
            raise SpecError(Problem(self._where, kind, "a file to write"))
        try:
            os.close(os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None
        return self

    def write(self, text: str) -> None:
        """Puts the text in the file's place."""
        try:
            with open(self._draft, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(self._draft, self.path)
        except OSError as error:
            raise self._unwritable(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draft.unlink(missing_ok=True)

    def _unwritable(self, error: Exception) -> SpecError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return SpecError(
            Problem(self._where, f"cannot be written ({reason})", "a file in a folder that exists")
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
