"""Out of memory, predicted against measured: how often each of the four outcomes occurred."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from planner.validation.scores import ScoredRow

__all__ = ["Reliability", "outcomes", "reliability"]

_EDGES = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)


class Reliability(NamedTuple):
    """Runs whose predicted probability of failing lies between two, ends included below: how many, and how many failed."""

    low: float
    high: float
    runs: int
    predicted: float
    failed: int

    @property
    def observed(self) -> float:
        """Share of them that failed."""
        return self.failed / self.runs


def outcomes(rows: Iterable[ScoredRow]) -> dict[str, float] | None:
    """Counts of rows judged by ``oom``, and their balanced accuracy; None where no row was.

    ``tp``: ran out of memory, as predicted; ``fp``: predicted alone; ``tn``: neither; ``fn``: measured alone. Balanced accuracy
    is the mean of both outcomes' recall, or the recall of the one that was measured. Measured and predicted are 1 for failing.

    >>> fits = ScoredRow("a", "f", "oom", "scored", measured=0.0, predicted=0.0)
    >>> fails = ScoredRow("b", "f", "oom", "scored", measured=1.0, predicted=0.0)
    >>> outcomes([fits, fails])
    {'tp': 0, 'fp': 0, 'tn': 1, 'fn': 1, 'balanced_accuracy': 0.5}
    """
    pairs = [
        (bool(row.measured), bool(row.predicted))
        for row in rows
        if row.metric == "oom" and row.status == "scored"
    ]
    if not pairs:
        return None
    tp, fp, tn, fn = (pairs.count(p) for p in ((True, True), (False, True), (False, False), (True, False)))
    recalls = [right / (right + wrong) for right, wrong in ((tp, fn), (tn, fp)) if right + wrong]
    return {"tp": tp, "fp": fp, "tn": tn, "fn": fn, "balanced_accuracy": sum(recalls) / len(recalls)}


def reliability(cases: Iterable[tuple[float, bool]]) -> Iterator[Reliability]:
    """Predicted probabilities against outcomes, from the least likely on; bins without runs are left out.

    Args:
        cases: of each run, the probability of failing, and whether it failed.

    >>> [tuple(found) for found in reliability([(0.0, False), (0.02, False), (0.04, True)])]
    [(0.0, 0.01, 1, 0.0, 0), (0.01, 0.05, 2, 0.03, 1)]
    """
    known = sorted(cases)
    for low, high in pairwise(_EDGES):
        inside = [case for case in known if low <= case[0] < high or case[0] == high == _EDGES[-1]]
        if inside:
            mean = sum(probability for probability, _ in inside) / len(inside)
            yield Reliability(low, high, len(inside), mean, sum(failed for _, failed in inside))
