"""The options of ``planner solve``: a job or a file, limits and lists, with every fault at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from planner.cli.options import option
from planner.errors import Problem, SpecError, did_you_mean

if TYPE_CHECKING:
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model
    from planner.specs.stack import Stack
    from planner.specs.workload import TrainWorkload

__all__ = [
    "Backend",
    "Deadline",
    "SolveJob",
    "read_backend",
    "read_deadline",
    "read_degrees",
    "read_histogram",
    "read_mesh",
    "read_share",
]

Backend = Annotated[
    str, option("--backend", text="Of integer programs: scipy or pulp [scipy].", metavar="NAME")
]
Deadline = Annotated[
    str, option("--deadline", text="Then the best so far, with its gap [60s].", metavar="TIME")
]

_FLAGS = {name: f"--{name}" for name in ("model", "cluster", "stack")}
_DIGITS = 8  # of the longest number: far beyond any real job


class SolveJob:
    """What a problem is priced with; faults are noted, and raised together by :meth:`raise_if_any`.

    ``priced`` problems need a cluster, those with a ``length`` a sequence length; a file takes the place of a model.
    """

    def __init__(
        self, file: str | None, model: str | None, cluster: str | None, batch: str, seq_len: str | None, fix: list[str] | None,
        stack: str, memory: str | None, deadline: str, backend: str, *, priced: bool = True, length: bool = True,
    ) -> None:  # fmt: skip
        from planner.cli.values import optional_quantity, parse_fixed, read_cluster, read_model, read_stack
        from planner.units import parse_bytes

        self.faults: list[Problem] = []
        self._model = None if file is not None else self.attempt(read_model, model)
        if priced and cluster is None:
            self.faults.append(Problem("--cluster", "is missing", "a cluster, such as h100-sxm:4x8"))
        self._cluster = None if cluster is None else self.attempt(read_cluster, cluster)
        self._stack = self.attempt(read_stack, stack)
        if file is None and length and seq_len is None:
            self.faults.append(Problem("--seq-len", "is missing", "a whole number, tokens per sequence"))
        if file is not None and model is not None:
            self.faults.append(Problem("--model", f"{model!r} beside the file {file!r}", "one of them"))
        self.attempt(read_backend, backend)
        self._batch = self.whole("--batch", batch)
        self._seq_len = 1 if seq_len is None else self.whole("--seq-len", seq_len)
        self.knobs: dict[str, str] = self.attempt(parse_fixed, fix or []) or {}
        self.memory_bytes = optional_quantity(self.faults, "--memory", memory, parse_bytes)
        if self.memory_bytes is not None and self.memory_bytes <= 0.0:
            self.faults.append(Problem("--memory", repr(memory), "a size above 0, such as 60GiB"))
        self.deadline_s: float | None = self.attempt(read_deadline, deadline)

    def attempt(self, make: Callable[..., Any], *values: Any) -> Any:
        """What ``make`` returns; its faults are noted."""
        from planner.cli.values import attempt

        return attempt(self.faults, make, *values, flags=_FLAGS)

    def whole(self, flag: str, text: str, least: int = 1) -> int:
        """A whole number; a fault is noted."""
        number = _number(text)
        if number < least:
            self.faults.append(Problem(flag, repr(text[:40]), f"a whole number from {least}"))
        return max(number, least)

    def check(self, flag: str, text: str, known: Sequence[str]) -> None:
        """Notes a fault where an option is none of these."""
        self.attempt(_one_of, flag, text, known)

    def raise_if_any(self) -> None:
        """Raises all noted faults."""
        from planner.cli.values import raise_if_any

        raise_if_any(self.faults)

    def workload(self, seq_len: int | None = None) -> TrainWorkload:
        """The micro-batch as a job."""
        from planner.specs.workload import TrainWorkload

        return TrainWorkload(self._batch, seq_len or self._seq_len)

    @property
    def model(self) -> Model:
        """The model, where there is no fault."""
        assert self._model is not None
        return self._model  # type: ignore[no-any-return]

    @property
    def cluster(self) -> Cluster:
        """The cluster, where there is no fault."""
        assert self._cluster is not None
        return self._cluster  # type: ignore[no-any-return]

    @property
    def stack(self) -> Stack:
        """The software stack, where there is no fault."""
        assert self._stack is not None
        return self._stack  # type: ignore[no-any-return]


def read_backend(text: str) -> str:
    """The solver of integer programs.

    Raises:
        SpecError: there is none of this name.
    """
    from planner.solve.combinatorial.milp import BACKENDS

    return _one_of("--backend", text, BACKENDS)


def _one_of(flag: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        hint = did_you_mean(text, known)
        raise SpecError(Problem(flag, repr(text[:40]), f"one of {', '.join(known)}", hint))
    return text


def read_deadline(text: str) -> float:
    """Seconds of ``--deadline``.

    Raises:
        SpecError: it is no duration.
    """
    from planner.units import parse_seconds

    try:
        seconds = parse_seconds(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0.0:
        raise SpecError(Problem("--deadline", repr(text[:40]), "a duration such as 10s"))
    return seconds


def read_mesh(text: str | None) -> tuple[int, ...]:
    """Ranks along every axis of ``4x8``.

    Raises:
        SpecError: it is no mesh.

    >>> read_mesh("4x8")
    (4, 8)
    """
    degrees = tuple(_number(part) for part in (text or "").lower().split("x"))
    if min(degrees) < 1:
        raise SpecError(Problem("--mesh", _found(text), "ranks along every axis, such as 4x8"))
    return degrees


def read_histogram(text: str | None) -> dict[int, int]:
    """Sequences of every length in ``4096:128,65536:4``.

    Raises:
        SpecError: it is no histogram.

    >>> read_histogram("4096:128, 65536:4")
    {4096: 128, 65536: 4}
    """
    pairs = [[_number(part) for part in pair.split(":")] for pair in (text or "").split(",")]
    good = all(len(pair) == 2 and min(pair) > 0 for pair in pairs)
    if not good or len({pair[0] for pair in pairs}) < len(pairs):
        raise SpecError(
            Problem("--lengths", _found(text), "different lengths with counts, such as 4096:128,65536:4")
        )
    return {length: count for length, count in pairs}  # noqa: C416


def read_degrees(text: str) -> list[int]:
    """Group sizes in ``1,2,4,8``, ascending.

    Raises:
        SpecError: they are no different whole numbers.
    """
    degrees = [_number(part) for part in text.split(",")]
    if min(degrees) < 1 or len(set(degrees)) < len(degrees):
        raise SpecError(Problem("--degrees", _found(text), "different whole numbers, such as 1,2,4,8"))
    return sorted(degrees)


def read_share(text: str) -> float:
    """The fraction that ``1%`` is.

    Raises:
        SpecError: it is none.
    """
    try:
        share = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < 1.0:
        raise SpecError(Problem("--gap", repr(text[:40]), "a share such as 1%"))
    return share


def _number(text: str) -> int:
    """A whole number of a few digits; -1 where it is none."""
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS else -1


def _found(text: str | None) -> str:
    return "is missing" if not text else repr(text[:40])
