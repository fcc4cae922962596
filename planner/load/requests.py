"""What is asked of a pool: requests with their arrivals and lengths, drawn from a law or read from a trace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.errors import Problem, SpecError

__all__ = ["Lengths", "Requests", "draw", "read_trace"]

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_MOST_PROBLEMS = 20
_MOST_TOKENS = 10**8
_MOST_REQUESTS = 10**7
_COLUMNS = {
    "arrival_s": ("arrival_s", "arrived_at", "timestamp", "arrival"),
    "prompt_tokens": ("prompt_tokens", "num_prefill_tokens", "contexttokens", "input_tokens"),
    "output_tokens": ("output_tokens", "num_decode_tokens", "generatedtokens"),
    "priority": ("priority",),
}
"""What the columns of a trace may be called: here, by Vidur, and in the Azure LLM inference traces."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of prompts and outputs: means and squared coefficients of variation; numbers, or one per row.

    Attributes:
        prompt_tokens, output_tokens: means; the first output token comes from the prefill.
        prompt_cv2, output_cv2: 0 for fixed, 1 for exponential lengths; drawn from a gamma law.
        prefix_hit: fraction of a prompt that is in the cache already: attended to and held, not computed.
    """

    prompt_tokens: Any
    output_tokens: Any
    prompt_cv2: Any = 0.0
    output_cv2: Any = 0.0
    prefix_hit: Any = 0.0

    def __post_init__(self) -> None:
        bounds = {
            "prompt_tokens": (1, _MOST_TOKENS),
            "output_tokens": (1, _MOST_TOKENS),
            "prompt_cv2": (0, 100),
            "output_cv2": (0, 100),
            "prefix_hit": (0, 1),
        }
        faults = [
            Problem(name, repr(getattr(self, name)), f"a number from {least} to {most:,}")
            for name, (least, most) in bounds.items()
            if not np.all(
                (np.asarray(getattr(self, name)) >= least) & (np.asarray(getattr(self, name)) <= most)
            )
        ]
        if faults:
            raise SpecError(faults)

    @property
    def computed_tokens(self) -> Any:
        """Prompt tokens that a prefill computes, on average; at least the last one."""
        return np.maximum(np.multiply(self.prompt_tokens, 1.0 - np.asarray(self.prefix_hit)), 1.0)

    @property
    def decodes(self) -> Any:
        """Iterations that a request decodes in, on average."""
        return np.asarray(self.output_tokens) - 1.0

    @property
    def context_tokens(self) -> Any:
        """Tokens that a decode attends to, seen at a random decode: long outputs are seen more often."""
        tail = np.maximum(np.asarray(self.output_tokens) - 1.0, 0.0) * (1.0 + np.asarray(self.output_cv2))
        return np.asarray(self.prompt_tokens) + 0.5 * (tail + 1.0)

    @property
    def prefill_context_tokens(self) -> Any:
        """Tokens that a prompt's computed tokens attend to, summed, on average: ``E[c·s + c(c + 1)/2]``."""
        second = np.square(self.prompt_tokens) * (1.0 + np.asarray(self.prompt_cv2))
        missed = 1.0 - np.asarray(self.prefix_hit)
        return second * missed * (1.0 - 0.5 * missed) + 0.5 * self.computed_tokens


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests in order of arrival, one array entry each.

    Attributes:
        arrival_s: seconds since the start.
        prompt_tokens, output_tokens: lengths, at least 1.
        cached_tokens: of the prompt, not to be computed.
        priority: the lower, the more urgent.
    """

    arrival_s: Reals
    prompt_tokens: Integers
    output_tokens: Integers
    cached_tokens: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    priority: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        for name in ("cached_tokens", "priority"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.zeros(len(self.arrival_s), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.arrival_s)

    def cached(self, fraction: float) -> Requests:
        """The same requests with this fraction of every prompt in the cache; the last token is always computed."""
        tokens = np.floor(self.prompt_tokens * fraction).astype(np.int64)
        return replace(self, cached_tokens=np.minimum(tokens, self.prompt_tokens - 1))


def draw(
    lengths: Lengths, count: int, *, rate_per_s: float | None = None, arrival_cv2: float = 1.0, seed: int = 0
) -> Requests:
    """Random requests: gaps between arrivals and lengths are gamma with the squared variation asked for.

    ``arrival_cv2`` 1 is a Poisson stream, more is bursty, 0 is even. Without a rate all arrive at once, as in a
    benchmark with a fixed concurrency.

    Raises:
        SpecError: no requests or more than fit in memory, a rate that is not positive, or a negative variation.

    >>> len(draw(Lengths(100, 10, output_cv2=1.0), 5, rate_per_s=2.0))
    5
    """
    faults = []
    if not 1 <= count <= _MOST_REQUESTS:
        faults.append(Problem("requests", repr(count), f"a whole number from 1 to {_MOST_REQUESTS:,}"))
    if rate_per_s is not None and not 0.0 < rate_per_s < np.inf:
        faults.append(Problem("rate", repr(rate_per_s), "requests per second above 0"))
    if not 0.0 <= arrival_cv2 < np.inf:
        faults.append(Problem("arrival_cv2", repr(arrival_cv2), "a number from 0"))
    if faults:
        raise SpecError(faults)
    random = np.random.default_rng(seed)
    gaps_s = np.zeros(count) if rate_per_s is None else _gamma(random, 1.0 / rate_per_s, arrival_cv2, count)
    prompt = _tokens(random, lengths.prompt_tokens, lengths.prompt_cv2, count)
    output = _tokens(random, lengths.output_tokens, lengths.output_cv2, count)
    return Requests(np.cumsum(gaps_s), prompt, output).cached(float(lengths.prefix_hit))


def _gamma(random: np.random.Generator, mean: float, cv2: float, count: int) -> Reals:
    return np.full(count, float(mean)) if cv2 == 0.0 else random.gamma(1.0 / cv2, mean * cv2, count)


def _tokens(random: np.random.Generator, mean: float, cv2: float, count: int) -> Integers:
    """One token and a gamma law of the others, rounded up or down at random so that the mean is as asked."""
    more = mean - 1.0
    drawn = np.zeros(count) if more <= 0.0 else _gamma(random, more, cv2 * (mean / more) ** 2, count)
    return 1 + np.floor(drawn + random.random(count)).astype(np.int64)


def read_trace(path: str | Path) -> Requests:
    """A CSV file with a header and one request a line: when it came, tokens of its prompt and of its output.

    Columns may be called as in Vidur's or Azure's traces; arrivals are seconds or ISO times, and the first is
    the start. A column ``priority`` is optional, others are ignored.

    Raises:
        SpecError: the file cannot be read, or lines are broken (the first of them are named).
    """
    import csv

    where = str(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            lines = [(number, row) for number, row in enumerate(csv.reader(stream), 1) if any(row)]
    except FileNotFoundError:
        raise SpecError(Problem(where, "no such file", "a CSV file", "Check the path.")) from None
    except (OSError, ValueError, csv.Error) as error:
        raise SpecError(Problem(where, f"cannot be read ({error})", "a CSV file")) from None
    if not lines:
        raise SpecError(Problem(where, "is empty", "a header and one request a line"))
    columns = _find_columns(where, lines[0][1])
    if len(lines) == 1:
        raise SpecError(Problem(where, "holds no request", "one request a line"))
    faults: list[Problem] = []
    table = [_read_line(where, number, row, columns, faults) for number, row in lines[1:]]
    if faults:
        rest = len(faults) - _MOST_PROBLEMS
        more = [Problem(where, f"{rest} more problems")] if rest > 0 else []
        raise SpecError([*faults[:_MOST_PROBLEMS], *more])
    arrival, prompt, output, priority = (np.array(column) for column in zip(*table, strict=True))
    order = np.argsort(arrival, kind="stable")
    whole = [column[order].astype(np.int64) for column in (prompt, output, priority)]
    return Requests(arrival[order] - arrival[order][0], whole[0], whole[1], priority=whole[2])


def _find_columns(where: str, header: Iterable[str]) -> dict[str, int]:
    spelled = [name.strip().lower() for name in header]
    found = {
        column: next(i for i, name in enumerate(spelled) if name in names)
        for column, names in _COLUMNS.items()
        if any(name in names for name in spelled)
    }
    missing = [column for column in _COLUMNS if column not in found and column != "priority"]
    if missing:
        expected = "columns arrival_s, prompt_tokens, output_tokens"
        raise SpecError(
            Problem(
                f"{where}: line 1",
                f"no column {', '.join(missing)}",
                expected,
                f"Found: {', '.join(spelled)}.",
            )
        )
    return found


def _read_line(
    where: str, number: int, row: list[str], columns: dict[str, int], faults: list[Problem]
) -> tuple[float, float, float, float]:
    values: list[float] = []
    for column in _COLUMNS:
        index = columns.get(column)
        text = "0" if index is None else row[index].strip() if index < len(row) else ""
        try:
            values.append(_seconds(text) if column == "arrival_s" else _count(text, column))
        except ValueError as error:
            faults.append(Problem(f"{where}: line {number}: {column}", repr(text[:40]), str(error)))
            values.append(0.0)
    return values[0], values[1], values[2], values[3]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text[:26]).timestamp()
        except ValueError:
            raise ValueError("seconds, or an ISO time") from None
    if not 0.0 <= value < 1e12:
        raise ValueError("seconds from 0 to 1e12")
    return value


def _count(text: str, column: str) -> float:
    least = 0 if column == "priority" else 1
    expected = f"a whole number from {least} to {_MOST_TOKENS:,}"
    try:
        value = float(text)
    except ValueError:
        raise ValueError(expected) from None
    if not (least <= value <= _MOST_TOKENS and value == int(value)):
        raise ValueError(expected)
    return value
