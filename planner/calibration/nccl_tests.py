"""The text that NVIDIA's nccl-tests print: size, time and bandwidth per line, ranks and hosts in the header.

Out-of-place times are taken. The size is that of the larger buffer for all-gather and reduce-scatter, and of one rank's buffer
for all-to-all (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import re

from planner.calibration.measurements import COLLECTIVES, Measurement, Message
from planner.errors import Problem, SpecError

__all__ = ["is_nccl_tests", "read_nccl_tests"]

_RANK = re.compile(r"^#\s+Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device", re.MULTILINE)
_ROW = re.compile(
    r"^\s*(\d+)\s+(\d+)\s+([a-z0-9_]+)\s+(?:([a-z]+)\s+)?(?:(-?\d+)\s+)?(\d[\d.]*)\s+[\d.]+\s+[\d.]+"
)
_PROGRAM = re.compile(r"([a-z_]+)_perf\b")


def is_nccl_tests(text: str) -> bool:
    """Whether the text is such output."""
    return "# Using devices" in text and "algbw" in text


def read_nccl_tests(text: str, where: str) -> list[Measurement]:
    """Times of all sizes; several runs may stand in one text, each with its own header.

    Raises:
        SpecError: a run does not name its collective or its ranks, or a time is not positive.
    """
    runs = text.split("# Using devices")
    found: list[Measurement] = []
    line = runs[0].count("\n") + 1
    program = _program(runs[0], "")
    for run in runs[1:]:
        hosts = dict(_RANK.findall(run))
        if not hosts:
            raise SpecError(Problem(where, "lists no ranks", "lines '#  Rank 0 … on HOST device 0'"))
        if not program:
            hint = "Keep the command line, such as 'all_reduce_perf -b 8 -e 8G', in the file."
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
            if seconds <= 0.0:
                raise SpecError(Problem(f"{where}:{line + number}", f"time {match[6]} µs", "a positive time"))
            work = Message(COLLECTIVES[program], ranks, per_node, float(match[1]))
            found.append(Measurement(f"{where}:{line + number}", work, seconds))
        line += run.count("\n")
        program = _program(run, program)
    return found


_KNOWN = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "broadcast", "sendrecv")


def _program(text: str, before: str) -> str:
    """The collective of the last command line in a text; else the one before."""
    names = [name for name in _PROGRAM.findall(text) if name in _KNOWN]
    return names[-1] if names else before
