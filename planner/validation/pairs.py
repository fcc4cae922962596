"""How often two plans for one job come out in the predicted order: what published sweeps say of the noise of a comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from planner.plans.plan import Estimate
from planner.uncertainty.residuals import COVERAGE
from planner.uncertainty.ties import pair_distance

__all__ = ["PairNoise", "RankedRun", "pair_noise_of"]

_EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, np.inf)  # of distances; about doubling
_FEWEST = 10  # pairs that a noise is taken from


@dataclass(frozen=True, slots=True)
class RankedRun:
    """One run of a sweep: what it may be compared with, its estimate, and log(measured/predicted) of its rate."""

    sweep: Hashable
    estimate: Estimate
    residual: float


@dataclass(frozen=True, slots=True)
class PairNoise:
    """Noise of a comparison by how unlike two plans are (see :mod:`planner.uncertainty.ties`), and what it comes from."""

    distances: tuple[float, ...]
    noises: tuple[float, ...]
    rows: int
    sweeps: int


def pair_noise_of(runs: Sequence[RankedRun]) -> PairNoise:
    """The noise at which the order of two plans is right four times out of five; it does not fall with the distance.

    Residuals of two plans differ by as much to either side. So the order is right with probability 0.8 where the predicted
    difference is as large as |the difference of residuals| is in 60 % of pairs. Sweeps weigh by their plans.
    """
    sweeps: dict[Hashable, list[RankedRun]] = defaultdict(list)
    for run in runs:
        sweeps[run.sweep].append(run)
    several = [members for members in sweeps.values() if len(members) > 1]
    pairs = [
        (pair_distance(one.estimate, other.estimate), abs(one.residual - other.residual), 1.0 / (len(members) - 1))
        for members in several
        for one, other in combinations(members, 2)
    ]  # fmt: skip
    table = np.array(pairs).reshape(-1, 3)
    distances, noises, noise = [], [], 0.0
    for low, high in pairwise(_EDGES):
        inside = table[(table[:, 0] >= low) & (table[:, 0] < high)]
        if len(inside) >= _FEWEST:
            noise = max(noise, _weighted_quantile(inside[:, 1], inside[:, 2], 2.0 * COVERAGE - 1.0))
            distances.append(float(np.median(inside[:, 0])))
            noises.append(noise)
    return PairNoise(tuple(distances), tuple(noises), sum(map(len, several)), len(several))


def _weighted_quantile(values: np.ndarray, weights: np.ndarray, probability: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) - 0.5 * weights[order]
    return float(np.interp(probability * weights.sum(), reached, values[order]))
