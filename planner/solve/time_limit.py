"""One time limit for everything that a command searches: what comes first leaves the rest to what comes after.

>>> limit = TimeLimit(60.0)
>>> limit.share(2).left_s <= 30.0 < limit.left_s  # the first of two searches; the second one gets what it leaves, too
True

A limit that is enforced ends what takes long wherever it is, as Ctrl-C does: tables of strategies and linear programs ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

__all__ = ["FOREVER", "OutOfTimeError", "TimeLimit", "ask"]

_END_S: ContextVar[float] = ContextVar("end_s", default=np.inf)


class OutOfTimeError(Exception):
    """The time that is enforced is over."""


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """Seconds from now on; infinite, if there is no limit."""

    seconds: float = np.inf
    start_s: float = field(default_factory=lambda: perf_counter())

    @property
    def end_s(self) -> float:
        """The reading of the clock at which the time is over."""
        return self.start_s + self.seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left, never below zero."""
        return max(self.end_s - perf_counter(), 0.0)

    def share(self, of: float) -> TimeLimit:
        """A limit of its own for the first of some searches that are still to come, by how many they are."""
        return TimeLimit(self.left_s / of)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Within, :func:`ask` ends the work when the time is over; the limits around it hold as well.

        Raises:
            OutOfTimeError: it did.
        """
        token = _END_S.set(min(self.end_s, _END_S.get()))
        try:
            yield
        finally:
            _END_S.reset(token)


FOREVER = TimeLimit()


def ask() -> None:
    """Ends the work if the time that is enforced is over; where none is, nothing happens.

    Raises:
        OutOfTimeError: it is.
    """
    end_s = _END_S.get()
    if end_s < np.inf and perf_counter() > end_s:
        raise OutOfTimeError
