"""Times work on a device so that other processes do not show.

One thread on a CPU is timed by the processor time that it used, which stands still while others have its core. Several
threads are timed by the clock; then a repeat counts if they hardly had to wait for a core, and repeats go on
until enough count or patience ends, with a pause after every disturbed one. On other devices the stream is synchronised around
each repeat.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

__all__ = ["Timing", "keep_freed_memory", "repeated", "timed", "waited_s"]

_SHORTEST_S = 5e-3  # of one repeat: many clock ticks
_ENOUGH, _PATIENCE = 5, 25  # repeats that count, repeats at most
_WAIT_S = 0.3  # before the next repeat, after a disturbed one: others have their turn, and may be done
_DISTURBED = 0.05  # share of a repeat that threads waited for a core
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
        wall, cpu, waited = time.perf_counter(), time.process_time(), waited_s()
        for _ in range(inner):
            call()
        if synchronise is not None:
            synchronise()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if synchronise is None and threads == 1:
            return cpu / inner, True
        return wall / inner, synchronise is not None or waited_s() - waited <= _DISTURBED * wall

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


def waited_s() -> float:
    """Seconds that threads of this process were ready to run and had no core, since they began; 0 where Linux does not tell."""
    total_ns = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # it may end while we look
            total_ns += int(thread.read_text(encoding="ascii").split()[1])
    return total_ns * 1e-9


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
