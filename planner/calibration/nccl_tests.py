"""The text that NVIDIA's nccl-tests print: size, time and bandwidth per line, ranks and hosts in the header.

Tables of all ages are read: with a column ``root`` or without, errors as a number (to 2021) or as ``#wrong``, header lines
with or without ``#``. Out-of-place times are taken; a row with wrong results is refused. The size is that of the larger
buffer for all-gather and reduce-scatter, and of one rank's buffer for all-to-all (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import re

from planner.calibration.measurements import COLLECTIVES, Measurement, Message
from planner.errors import Problem, SpecError

__all__ = ["is_nccl_tests", "read_nccl_tests"]

_RANK = re.compile(r"^#?\s*Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device", re.MULTILINE)
_ROW = re.compile(
    r"^\s*(\d+)\s+(\d+)\s+([a-z0-9_]+)\s+(?:([a-z]+)\s+)?(?:(-?\d+)\s+)?(\d[\d.]*)\s+[\d.]+\s+[\d.]+(?:\s+(\S+))?"
)
_HEADING = re.compile(r"^#?\s*Using devices", re.MULTILINE)
_PREFIX = re.compile(
    r"^(?:\[\d+,\d+\]<std\w+>:|[ \t]*\d+:) ?", re.MULTILINE
)  # mpirun --tag-output; srun --label
_PROGRAM = re.compile(r"([a-z_]+)_perf\b")


def is_nccl_tests(text: str) -> bool:
    """Whether the text is such output."""
    return "algbw" in text and _HEADING.search(_PREFIX.sub("", text)) is not None


def read_nccl_tests(text: str, where: str) -> list[Measurement]:
    """Times of all sizes; several runs may stand in one text, each with its own header.

    Lines may begin with the rank that printed them; where no command line names the collective, the name of the file may.

    Raises:
        SpecError: a run does not name its collective or its ranks, or a time is not positive.
    """
    runs = _HEADING.split(_PREFIX.sub("", text))
    found: list[Measurement] = []
    line = runs[0].count("\n") + 1
    program = _program(runs[0], _named(where))
    for run in runs[1:]:
        hosts = dict(_RANK.findall(run))
        if not hosts:
            raise SpecError(Problem(where, "lists no ranks", "lines '#  Rank 0 … on HOST device 0'"))
        if not program:
            hint = "Keep the command line, such as 'all_reduce_perf -b 8 -e 8G', in the file, or name the file after it."
            raise SpecError(
                Problem(where, "does not name the collective", f"one of {', '.join(_KNOWN)}", hint)
            )
        ranks = len(hosts)
        per_node = max(ranks // len(set(hosts.values())), 1)
        for number, row in enumerate(run.splitlines()):
            match = _ROW.match(row)
            if match is None or int(match[1]) == 0 or ranks < 2:
                continue
            seconds = float(match[6]) * 1e-6
            if "#wrong" in run and (match[7] or "0").isdigit() and int(match[7] or 0) > 0:
                found_wrong = f"{match[7]} wrong results"
                hint = "The link or the library is at fault: its times mean nothing."
                raise SpecError(Problem(f"{where}:{line + number}", found_wrong, "0", hint))
            if seconds <= 0.0:
                raise SpecError(Problem(f"{where}:{line + number}", f"time {match[6]} µs", "a positive time"))
            work = Message(COLLECTIVES[program], ranks, per_node, float(match[1]))
            found.append(Measurement(f"{where}:{line + number}", work, seconds))
        line += run.count("\n")
        program = _program(run, program)
    return found


_KNOWN = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "broadcast", "sendrecv")


def _named(where: str) -> str:
    """The collective in a file's name; empty where it has none.

    >>> _named("logs/all_gather_16.txt")
    'all_gather'
    """
    return next((name for name in _KNOWN if name in where.rpartition("/")[2]), "")


def _program(text: str, before: str) -> str:
    """The collective of the last command line in a text; else the one before."""
    names = [name for name in _PROGRAM.findall(text) if name in _KNOWN]
    return names[-1] if names else before
