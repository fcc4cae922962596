"""Which unlike peers work on which stage, so that the slowest stage of a pipeline is as fast as can be.

A stage's peers share its micro-batches, so that its rate is the sum of their speeds over its work; the pipeline's rate is that of
its slowest stage. Peers of one speed are alike, and only their number per stage is chosen, by an integer program.

Source: M. Ryabinin et al. 2023 (SWARM parallelism, arXiv:2301.11913) §3.2, whose peers move to the slowest stage one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import Infeasible, Problem, SolverError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.milp import Program, solve

__all__ = ["Staffing", "longest_first", "staff"]


@dataclass(frozen=True, slots=True)
class Staffing:
    """Peers of every speed on every stage, (stages, speeds), and the rate of the slowest stage per unit of its work."""

    counts: tuple[tuple[int, ...], ...]
    rate: float
    certificate: Certificate


def staff(
    peers: Mapping[float, int],
    works: Sequence[float],
    *,
    backend: str = "scipy",
    time_limit_s: float | None = None,
) -> Staffing:
    """The allocation whose slowest stage is fastest.

    Args:
        peers: how many there are of every speed, in work per second.
        works: of every stage, per micro-batch.
        backend: of the integer program.
        time_limit_s: after which the best allocation so far is returned with its gap.

    Raises:
        Infeasible: there are fewer peers than stages.
        SolverError: the program finds nothing in time.

    >>> staff({3.0: 2, 2.0: 3}, [1.0, 1.0]).rate  # 3 + 3 and 2 + 2 + 2
    6.0
    """
    clock = Clock(time_limit_s)
    if sum(peers.values()) < len(works):
        raise Infeasible(
            Problem("peers", f"{sum(peers.values())} for {len(works)} stages", "one per stage at least")
        )
    speeds, counts = np.array(list(peers), dtype=float), np.array(list(peers.values()), dtype=float)
    program = Program()
    rate = program.variables([-1.0], upper=np.inf)
    held = program.variables(
        np.zeros((len(works), len(speeds))),
        upper=np.broadcast_to(counts, (len(works), len(speeds))),
        integer=True,
    )
    program.constrain(held.T, 1.0, low=counts, high=counts)
    program.constrain(
        np.column_stack([held, np.repeat(rate, len(works))]),
        np.column_stack([np.broadcast_to(speeds, held.shape), -np.array(works, dtype=float)]), low=0.0,
    )  # fmt: skip
    found = solve(program, backend=backend, time_limit_s=clock.left_s)
    if not found.found:
        raise SolverError(
            Problem("peers", f"{found.solver}: {found.status}", "an allocation in time", "Allow more time.")
        )
    chosen = np.rint(found.values[held]).astype(int)
    value = float((chosen @ speeds / np.array(works)).min())
    certificate = certify(-value, min(found.bound, -value), f"integer program ({backend})", clock)
    return Staffing(tuple(tuple(int(n) for n in row) for row in chosen), value, certificate)


def longest_first(peers: Mapping[float, int], works: Sequence[float]) -> float:
    """The rate where the fastest peers are dealt first, each to the stage that is slowest so far.

    >>> longest_first({3.0: 2, 2.0: 3}, [1.0, 1.0])
    5.0
    """
    rates = np.zeros(len(works))
    for speed in sorted(peers, reverse=True):
        for _ in range(peers[speed]):
            stage = int(rates.argmin())
            rates[stage] += speed / works[stage]
    return float(rates.min())
