"""Times work on a device: medians of repeats that no other process disturbed.

On a CPU that others use as well, a repeat counts if the machine was busy with hardly anything else meanwhile; repeats go on
until enough count or patience ends, with a pause after every disturbed one. On other devices the stream is synchronised around
each repeat.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

__all__ = ["Timing", "busy_s", "keep_freed_memory", "repeated", "timed"]

_SHORTEST_S = 5e-3  # of one repeat: many clock ticks
_ENOUGH, _PATIENCE = 5, 25  # repeats that count, repeats at most
_WAIT_S = 0.3  # before the next repeat, after a disturbed one: others have their turn, and may be done
_DISTURBED = 0.05  # share of a repeat in which the process did not have its cores
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, least and most of the repeats that count; ``quiet`` false: none was undisturbed."""

    seconds: float
    least_s: float
    most_s: float
    repeats: int
    quiet: bool = True


def timed(
    call: Callable[[], object], synchronise: Callable[[], None] | None = None, threads: int = 1
) -> Timing:
    """Times a call.

    Args:
        call: the work; it is called often.
        synchronise: waits for the device; None on a CPU, where work runs in the caller's ``threads``.
        threads: of the process, on a CPU.
    """
    call()
    start = time.perf_counter()
    call()
    if synchronise is not None:
        synchronise()
    inner = max(int(_SHORTEST_S / max(time.perf_counter() - start, 1e-9)), 1)

    def repeat() -> tuple[float, bool]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(inner):
            call()
        if synchronise is not None:
            synchronise()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall / inner, synchronise is not None or cpu / threads >= (1.0 - _DISTURBED) * wall

    return repeated(repeat)


def repeated(
    repeat: Callable[[], tuple[float, bool]], enough: int = _ENOUGH, patience: int = _PATIENCE
) -> Timing:
    """Repeats until enough undisturbed repeats are in; if there are none at all, the faster half of all stands in.

    Args:
        repeat: one repeat: its seconds, and whether it was undisturbed.
        enough: undisturbed repeats that suffice.
        patience: repeats at most.

    >>> repeated(iter([(3.0, True), (9.0, False), (1.0, True), (2.0, True)]).__next__, enough=3).seconds
    2.0
    """
    quiet: list[float] = []
    every: list[float] = []
    while len(quiet) < enough and len(every) < patience:
        seconds, undisturbed = repeat()
        every.append(seconds)
        if undisturbed:
            quiet.append(seconds)
        elif len(every) < patience:
            time.sleep(_WAIT_S)
    kept = quiet or sorted(every)[: (len(every) + 1) // 2]
    return Timing(median(kept), min(kept), max(kept), len(kept), bool(quiet))


def busy_s() -> float:
    """Seconds that all processes together have used this machine's processors, since it started; 0 where Linux does not tell."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, *_ = (int(text) for text in first.split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the process, as a caching allocator does; false where it cannot.

    Otherwise every large result is mapped anew, and writing it first costs a page fault per 4 KiB: what is measured is then the
    kernel's memory management.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
