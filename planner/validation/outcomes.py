"""Out of memory, predicted against measured: how often each of the four outcomes occurred."""

from __future__ import annotations

from collections.abc import Iterable

from planner.validation.scores import ScoredRow

__all__ = ["outcomes"]


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
