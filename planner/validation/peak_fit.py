"""Fits how uncertain peaks of memory are: by what is counted, what a process takes beside it, and what its software holds.

What is counted exactly errs by the floor, and everything else errs by that too. What a process takes beside it is fitted to peaks
that were read, and to runs that ran out of memory or did not: of these the peak is known on one side. Runs that ran out are what
the upper tail is there for, and no meter shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.ledger import Array
from planner.uncertainty.residuals import COVERAGE, Spreads, scale
from planner.validation.quantiles import TAILS, chances, log_unlikely, quantiles_of

__all__ = ["Outcome", "fit_peaks"]

_PROCESSES = np.geomspace(0.005, 0.5, 24)
_LEAST = 1e-3  # floor where nothing that is counted was read
_TINY = 1e-12
_Z = 1.2816  # deviations of a normal distribution within which 80 % lie
_FEWEST = 5  # residuals that a quantile of their own is taken from
_STEPS = 5  # each leaves a small part of the error, as the floor is one of what processes are uncertain by


class Outcome(NamedTuple):
    """Whether a run ran out of memory.

    Attributes:
        source, model: of the run.
        filled: predicted peak relative to the device's memory.
        software: share of that peak that software holds.
        ran_out: whether it did.
    """

    source: str
    model: str
    filled: float
    software: float
    ran_out: bool


def fit_peaks(
    spreads: Spreads, errors: Array, software: Array, counted: Array, outcomes: Sequence[Outcome]
) -> Spreads:
    """The spreads of peaks.

    Args:
        spreads: what runs they are of.
        errors: log(measured/predicted).
        software: share of the peak that software holds.
        counted: whether what was measured is counted exactly.
        outcomes: of runs that were not read.
    """
    if counted.all():
        floor = float(np.quantile(np.abs(errors), COVERAGE)) / _Z
        return spreads._replace(floor=max(floor, _LEAST), quantiles=quantiles_of(errors / max(floor, _LEAST)))
    room = -np.log([one.filled for one in outcomes])
    soft = np.array([one.software for one in outcomes])
    out = np.array([one.ran_out for one in outcomes], dtype=bool)

    def tried(process: float) -> tuple[float, Spreads]:
        """How unlikely all is with an error of processes, and the spreads then."""
        floor = _floor(errors, software, counted, process)
        scales = scale(floor, software, np.where(counted, 0.0, process))
        quantiles = quantiles_of(errors / scales)
        asked = room / scale(floor, process, soft)

        def unlikely(tail: float) -> float:
            above = chances(asked, quantiles, tail)
            return -float(np.sum(np.log(np.where(out, above, 1.0 - above))))

        tail = min(TAILS, key=lambda tail: unlikely(tail) + log_unlikely(errors / scales, quantiles, tail))
        read, known = np.abs(errors[~counted]), scales[~counted]
        laplace = len(read) * np.log(np.mean(read / known) + _TINY) + float(np.sum(np.log(known)))
        found = spreads._replace(floor=floor, process=process, quantiles=quantiles, tail=float(tail))
        return laplace + unlikely(tail), found

    # The mean over all that may be: between a tenth and a quarter hardly any is likelier than another.
    worse = np.array([tried(float(process))[0] for process in _PROCESSES])
    likely = np.exp(worse.min() - worse)
    return tried(float(likely @ _PROCESSES / likely.sum()))[1]


def _floor(errors: Array, software: Array, counted: Array, process: float) -> float:
    """What is counted exactly errs by that: as many of its errors lie as far out as of everything else; of few, none farther."""
    if not counted.any():
        return _LEAST
    found = np.abs(errors[counted])
    needed = float(np.quantile(found, COVERAGE) if len(found) >= _FEWEST else found.max())
    rest, soft, floor = np.abs(errors[~counted]), software[~counted], _LEAST
    for _ in range(_STEPS):
        reach = float(np.quantile(rest / scale(floor, process, soft), COVERAGE))
        floor = max(needed / reach, _LEAST)
    return floor
