"""Whether a prediction puts plans in the right order: Kendall's tau-b, and what picking the predicted best would cost.

Plans are compared inside a *sweep*: rows of one ``sweep_id`` with equal devices, model, sequence length, batch, dtype and
framework version. Runs whose plans ask the same of every device are repeats of one plan, whatever else their rows say (a ZeRO
group of all replicas is no group; packed samples that attend to themselves alone are samples), and count once, by their mean
rate. A sweep needs at least four distinct plans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from planner.validation.scores import ScoredRow

__all__ = ["FEWEST_PLANS", "Comparison", "Sweep", "kendall_tau_b", "ranking_summary", "sweeps", "top1_regret"]

FEWEST_PLANS = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run that may be ranked: its row, judged by ``ranking``, and what it is ranked with.

    Attributes:
        scored: measured and predicted rate, tokens/s per device.
        sweep: what runs that may be compared have in common.
        plan: what tells its plan from the others.
    """

    scored: ScoredRow
    sweep: tuple[Hashable, ...]
    plan: Hashable


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep: how well its plans were ordered."""

    file: str
    sweep_id: str
    plans: int
    rows: int
    kendall_tau: float
    top1_regret: float

    def as_dict(self) -> dict[str, object]:
        """The sweep as JSON fields."""
        return {
            "file": self.file,
            "sweep_id": self.sweep_id,
            "plans": self.plans,
            "rows": self.rows,
            "kendall_tau": self.kendall_tau,
            "top1_regret": self.top1_regret,
        }


def sweeps(runs: Iterable[Comparison]) -> list[Sweep]:
    """Scores of every sweep with enough distinct plans.

    Args:
        runs: runs of any files; those without both rates are passed over. ``sweep`` begins with file and ``sweep_id``.
    """
    groups: dict[tuple[Hashable, ...], dict[Hashable, list[ScoredRow]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run in runs:
        if run.scored.status == "scored" and run.scored.error is not None:
            groups[run.sweep][run.plan].append(run.scored)
    found = []
    for (file, sweep_id, *_), plans in groups.items():
        if len(plans) >= FEWEST_PLANS:
            measured, predicted = (
                [float(np.mean([getattr(row, name) for row in rows])) for rows in plans.values()]
                for name in ("measured", "predicted")
            )
            tau, regret = kendall_tau_b(measured, predicted), top1_regret(measured, predicted)
            rows = sum(map(len, plans.values()))
            found.append(Sweep(str(file), str(sweep_id), len(plans), rows, tau, regret))
    return found


def ranking_summary(found: Sequence[Sweep]) -> Mapping[str, float]:
    """How many sweeps of how many rows, and the means of both scores over the sweeps."""
    return {
        "sweeps": len(found),
        "rows": sum(sweep.rows for sweep in found),
        "kendall_tau_mean": float(np.mean([sweep.kendall_tau for sweep in found])),
        "top1_regret_mean": float(np.mean([sweep.top1_regret for sweep in found])),
    }


def kendall_tau_b(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's τ-b: concordant less discordant pairs, over the geometric mean of the pairs that are not tied in each.

    0 where either sequence is constant: it orders nothing. Source: Kendall 1945, Biometrika 33(3), 239–251.

    >>> kendall_tau_b([1, 2, 3, 4], [1, 2, 4, 3])  # five of six pairs agree, one does not
    0.6666666666666666
    """
    pairs = list(combinations(zip(left, right, strict=True), 2))
    signs = np.array([(np.sign(b[0] - a[0]), np.sign(b[1] - a[1])) for a, b in pairs]).reshape(-1, 2)
    ordered = np.abs(signs).sum(axis=0)
    if not ordered.all():
        return 0.0
    return float((signs[:, 0] * signs[:, 1]).sum() / np.sqrt(ordered.prod()))


def top1_regret(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """How much slower the plan with the best predicted rate is than the best measured one; the mean over plans tied at the top.

    >>> top1_regret([100.0, 80.0], [9.0, 10.0])  # picks the plan that takes 1.25 times as long
    0.25
    """
    rates, best = np.asarray(measured), max(measured)
    picked = rates[np.asarray(predicted) == max(predicted)]
    return float(np.mean(best / picked - 1.0))
