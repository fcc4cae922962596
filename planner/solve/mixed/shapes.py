"""Shapes of a pipeline on several node groups: their order, and how many stages each is cut into; and what no plan of one beats.

A shape says which group the stages run on and how many devices each stage has; degrees, layers and strategies are open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, permutations, product

import numpy as np

from planner.ledger import Array
from planner.solve.layerwise.relaxation import path_factor
from planner.solve.mixed.members import Members

_PRECISION = 1e-5  # relative, of a bound

__all__ = ["Paths", "Shape", "shapes"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Groups in the order of the pipeline, and the stages of each; no plan of it is faster than ``bound_s``."""

    bound_s: float
    alike: tuple[str, ...]
    micro_batches: int
    order: tuple[int, ...]
    stages: tuple[int, ...]

    def rank(self) -> tuple[float, tuple[str, ...], int, tuple[int, ...], tuple[int, ...]]:
        """What shapes are sorted by."""
        return self.bound_s, self.alike, self.micro_batches, self.order, self.stages

    @property
    def pp(self) -> int:
        """Stages of the pipeline."""
        return sum(self.stages)

    def seats(self) -> list[int]:
        """The group of every stage."""
        return [group for group, n in zip(self.order, self.stages, strict=True) for _ in range(n)]


def shapes(groups: Sequence[Members], layers: Array, lengths: Sequence[int] | None) -> Iterator[Shape]:
    """Every shape in which all groups take part.

    Args:
        groups: their members.
        layers: of each kind of layer; embedding and head follow as the last two kinds.
        lengths: of pipelines that are allowed; None: all.
    """
    by_job: dict[tuple[tuple[str, ...], int], list[list[tuple[int, Array]]]] = {}
    for number, members in enumerate(groups):
        for (alike, m, ranks), known in members.classes.items():
            least = np.min([member.seconds for member in known], axis=0)
            count = members.problem.cluster.devices // ranks
            job = by_job.setdefault((alike, m), [[] for _ in groups])
            job[number].append((count, least))
    most = int(layers.sum()) + 2
    for (alike, m), ways in by_job.items():
        for chosen in product(*ways):
            stages = [n for n, _ in chosen]
            if sum(stages) > most or (lengths is not None and sum(stages) not in lengths):
                continue
            paths = Paths(m, stages, [least for _, least in chosen], layers)
            bound_s = paths.bound_s(paths.dearest_s)
            for order in permutations(range(len(groups))):
                yield Shape(bound_s, alike, m, order, tuple(stages[g] for g in order))


class Paths:
    """What 1F1B takes at least through stages of some groups, wherever their layers are and whatever fits.

    Args:
        micro_batches: m.
        stages: of each group.
        least: seconds of a micro-batch in one block of each kind, per group.
        layers: of each kind of layer; embedding and head follow.
    """

    def __init__(
        self, micro_batches: int, stages: Sequence[int], least: Sequence[Array], layers: Array
    ) -> None:
        self.m, self.p = micro_batches, sum(stages)
        seconds = np.stack(least)
        inner = seconds[:, :-2]
        fastest = inner.min(axis=0)
        speed = np.max(fastest / inner, axis=1)  # relative to the fastest of each kind, at best
        first = np.argsort(-speed, kind="stable")
        self.speed = speed[first].tolist()
        self.rate = (
            np.array(stages)[first] * speed[first]
        ).tolist()  # work done while all stages are busy for a second
        self.ends_s = float(seconds[:, -2:].min(axis=0).sum())
        self.work_s = float(fastest @ layers)
        self.factor = float(path_factor("1f1b", self.p, np.array([float(micro_batches)]))[0])
        self._exhausted = [self.work_s / total for total in accumulate(self.rate)]
        self.dearest_s = self.work_s / sum(self.rate)
        """What the dearest stage works on a micro-batch at least: layers dealt as if they could be cut."""

    def bound_s(self, dearest_s: float) -> float:
        """The least step time where the dearest stage works ``dearest_s`` or more on a micro-batch.

        With ``z`` what that stage works and ``S`` what all do: its own work is ``m·z``; the path that goes down with the first
        micro-batch, stays on the dearest stage and comes up with the last takes ``2S + (m − p − 1)·z`` for m > p; and any
        stages take :func:`~planner.solve.layerwise.relaxation.path_factor` times ``S``. ``S`` falls as ``z`` grows, since faster
        groups may take more then. The answer is the smallest time in which some ``z`` keeps all three.
        """
        low, high = self.m * dearest_s, self.m * dearest_s + self.through_s(dearest_s) * (self.p + 2.0)
        if self._possible(dearest_s, low):
            return low
        while high - low > _PRECISION * high:
            middle = (low + high) / 2.0
            if self._possible(dearest_s, middle):
                high = middle
            else:
                low = middle
        return low

    def _possible(self, dearest_s: float, step_s: float) -> bool:
        """Whether some ``z`` between the dearest stage's least work and what a step has room for keeps the paths."""
        m, p, most_s = self.m, self.p, step_s / self.m
        if self.through_s(most_s) * self.factor > step_s:
            return False
        if m <= p:
            return True
        # The path's time is convex in z: its least value lies at an end, or where a group's share runs out.
        ends = [dearest_s, most_s, *(z for z in self._exhausted if dearest_s < z < most_s)]
        return bool(min(2.0 * self.through_s(z) + (m - p - 1.0) * z for z in ends) <= step_s)

    def through_s(self, dearest_s: float) -> float:
        """What all stages work on one micro-batch at least, none of them longer than a limit: the fastest groups do most."""
        left, total_s = self.work_s, self.ends_s
        for rate, speed in zip(self.rate, self.speed, strict=True):
            taken = min(left, rate * dearest_s)
            total_s += taken / speed
            left -= taken
        return total_s
