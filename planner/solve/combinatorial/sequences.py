"""Which group of devices works on which sequences: an assignment over a histogram of lengths.

- :func:`assign_sequences`: devices form groups of given degrees that work side by side; every sequence goes to one group,
  whose seconds and bytes for it are in a table (FlexSP; ByteScale's groups are one such assignment). Groups of one degree
  are alike and ordered by load; where one group size is used throughout, longest-first deals give the first answer.
- :func:`micro_batches`: sequences in the order of their length are cut into micro-batches, each padded to its longest, so
  that ``Σ t + (p − 1)·max t`` of the pipeline is least (DynaPipe): exact for every limit on the longest, over all limits.

Sources: Y. Wang et al. 2025 (FlexSP, arXiv:2412.01523) §4.1; C. Jiang et al. 2024 (DynaPipe, arXiv:2311.10418) §4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Infeasible, Problem, SolverError, SpecError
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.milp import Program, solve

__all__ = [
    "Groups",
    "MicroBatches",
    "SequenceProblem",
    "assign_sequences",
    "longest_first",
    "micro_batches",
    "one_size",
]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceProblem:
    """A histogram of sequences, and what each costs on groups of each degree.

    Attributes:
        lengths: of every bucket, tokens.
        counts: sequences in every bucket.
        degrees: sizes that a group may have.
        time_s: of one sequence, per bucket and degree.
        memory_bytes: of one sequence on each device of the group, per bucket and degree.
        devices: in all groups together.
        budget_bytes: for sequences, on each device.
        group_s: what a group takes besides its sequences, per degree.
        packed: a group's sequences run as one micro-batch and are held together (FlexSP's packing); False: one after the
            other, so that the largest decides.
        phases_s: ``time_s`` as forward, input gradients and weight gradients, or None: (3, buckets, degrees).
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    degrees: tuple[int, ...]
    time_s: Floats
    memory_bytes: Floats
    devices: int
    budget_bytes: float = np.inf
    group_s: tuple[float, ...] = ()
    packed: bool = False
    phases_s: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The degree of every group, and how many sequences of every bucket it gets: (groups, buckets)."""

    degrees: tuple[int, ...]
    counts: NDArray[np.intp]
    group_s: tuple[float, ...]
    time_s: float
    certificate: Certificate


def assign_sequences(
    problem: SequenceProblem, *, backend: str = "scipy", gap: float = 0.0, time_limit_s: float | None = None
) -> Groups:
    """The groups and the assignment whose slowest group is fastest.

    Args:
        problem: sequences and prices.
        backend: of the integer program.
        gap: relative; the search stops at a proof of this.
        time_limit_s: after which the best assignment so far is returned with its gap.

    Raises:
        Infeasible: a sequence fits on no group, or all sequences not on all devices.
        SolverError: the solver fails, or finds nothing in time.
    """
    clock = Clock(time_limit_s)
    known = one_size(problem)
    fits = (problem.memory_bytes <= problem.budget_bytes) & np.isfinite(problem.time_s)
    fits &= np.array(problem.degrees) <= problem.devices
    if not fits.any(axis=1).all():
        raise _too_long(problem, int(np.flatnonzero(~fits.any(axis=1))[0]))
    slots = [d for d, degree in enumerate(problem.degrees) for _ in range(problem.devices // degree)]
    bound = _work_bound(problem)
    program, dealt = _program(problem, slots, (bound, np.inf if known is None else known.time_s))
    answer = solve(program, backend=backend, time_limit_s=clock.left_s, gap=gap)
    bound, solver = max(bound, answer.bound if np.isfinite(answer.bound) else 0.0), answer.solver
    best = known
    if answer.found:
        table = np.rint(answer.values[dealt]).astype(np.intp)
        found = _evaluated(problem, slots, table)
        if best is None or found.time_s < best.time_s:
            best = found
    if best is None:
        if answer.status == "infeasible":
            too_many = "the sequences of one step do not fit on all devices together"
            raise Infeasible(Problem("memory", too_many, "fewer of them"))
        raise SolverError(Problem("solver", f"{solver} found no assignment in time", try_="Allow more time."))
    certificate = certify(
        best.time_s, min(bound, best.time_s), solver, clock, {"variables": program.n_variables}
    )
    return Groups(best.degrees, best.counts, best.group_s, best.time_s, certificate)


def _program(
    problem: SequenceProblem, slots: Sequence[int], within_s: tuple[float, float]
) -> tuple[Program, NDArray[np.intp]]:
    """The integer program, and its variables of how many sequences of every bucket a group gets: (groups, buckets).

    Args:
        problem: sequences and prices.
        slots: of every group that there may be, the index of its degree.
        within_s: what the slowest group is known to take at least and at most.
    """
    degree = np.array([problem.degrees[d] for d in slots], dtype=float)
    time_s, memory = problem.time_s[:, slots].T, problem.memory_bytes[:, slots].T  # (groups, buckets)
    extra = np.array([(problem.group_s or (0.0,) * len(problem.degrees))[d] for d in slots])
    counts = np.array(problem.counts, dtype=float)
    possible = (memory <= problem.budget_bytes) & np.isfinite(time_s)
    program = Program()
    longest = program.variables([1.0], upper=np.inf)
    used = program.variables(np.zeros(len(slots)), integer=True)
    dealt = program.variables(np.zeros(time_s.shape), upper=np.where(possible, counts, 0.0), integer=True)
    seconds = np.where(possible, time_s, 0.0)
    program.constrain(dealt.T, 1.0, low=counts, high=counts)
    program.constrain(used, degree, high=float(problem.devices))
    program.constrain(
        np.column_stack([dealt, used, np.repeat(longest, len(slots))]),
        np.column_stack([seconds, extra, np.full(len(slots), -1.0)]), high=0.0,
    )  # fmt: skip
    if problem.packed and np.isfinite(problem.budget_bytes):
        held = np.where(possible, memory, 0.0) / problem.budget_bytes
        room = np.column_stack([held, np.full(len(slots), -1.0)])
    else:
        room = np.append(np.ones(len(counts)), -counts.sum())
    program.constrain(np.column_stack([dealt, used]), room, high=0.0)
    for first, second in pairwise(range(len(slots))):
        if slots[first] == slots[second]:  # alike: the first is used before, and is no less busy
            program.constrain([used[first], used[second]], [1.0, -1.0], low=0.0)
            columns = np.concatenate([dealt[first], dealt[second]])
            program.constrain([columns], [np.concatenate([seconds[first], -seconds[second]])], low=0.0)
    least_s, most_s = within_s
    program.constrain([longest], 1.0, low=least_s)
    if most_s < np.inf:
        program.constrain([longest], 1.0, high=most_s * (1.0 + 1e-9))
    return program, dealt


def longest_first(problem: SequenceProblem, degree: int) -> Groups | None:
    """Equal groups of one degree, every sequence, the slowest first, to the least busy group with room; None: it does not fit."""
    d = problem.degrees.index(degree)
    groups = problem.devices // degree
    load, held = np.zeros(groups), np.zeros(groups)
    table = np.zeros((groups, len(problem.counts)), dtype=np.intp)
    for bucket in np.argsort(-problem.time_s[:, d], kind="stable"):
        for _ in range(problem.counts[bucket]):
            fits = problem.packed * held + problem.memory_bytes[bucket, d] <= problem.budget_bytes
            if not fits.any() or not np.isfinite(problem.time_s[bucket, d]):
                return None
            group = int(np.argmin(np.where(fits, load, np.inf)))
            table[group, bucket] += 1
            load[group] += problem.time_s[bucket, d]
            held[group] += problem.memory_bytes[bucket, d]
    return _evaluated(problem, [d] * groups, table)


def one_size(problem: SequenceProblem) -> Groups | None:
    """The fastest groups that are all of one size, dealt longest first; None: none has room for all sequences."""
    found = [longest_first(problem, degree) for degree in problem.degrees if degree <= problem.devices]
    return min((groups for groups in found if groups is not None), key=lambda g: g.time_s, default=None)


def _work_bound(problem: SequenceProblem) -> float:
    """The work of all sequences, each on its most efficient group, over all devices; and the fastest of the slowest sequence."""
    fits = problem.memory_bytes <= problem.budget_bytes
    seconds = np.where(fits, problem.time_s, np.inf)
    work = (seconds * np.array(problem.degrees)).min(axis=1) @ np.array(problem.counts)
    return max(float(work) / problem.devices, float(seconds.min(axis=1).max()))


def _evaluated(problem: SequenceProblem, slots: Sequence[int], table: NDArray[np.intp]) -> Groups:
    """The groups that have anything to do, with their seconds."""
    extra = problem.group_s or (0.0,) * len(problem.degrees)
    busy = [g for g in range(len(slots)) if table[g].any()]
    seconds = tuple(
        float(sum(n * problem.time_s[b, slots[g]] for b, n in enumerate(table[g]) if n)) + extra[slots[g]]
        for g in busy
    )
    longest = max(seconds, default=0.0)
    unproved = Certificate("gap", longest, 0.0, 1.0, "longest first", 0.0)
    return Groups(tuple(problem.degrees[slots[g]] for g in busy), table[busy], seconds, longest, unproved)


def _too_long(problem: SequenceProblem, bucket: int) -> Infeasible:
    return Infeasible(
        Problem(
            f"sequences of {problem.lengths[bucket]:,} tokens", "fit on no group", "a degree on which one fits",
            "Allow larger groups.",
        )
    )  # fmt: skip


# -- micro-batches of a pipeline -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Where every micro-batch begins and ends in the sorted lengths, and what the pipeline takes."""

    cuts: tuple[tuple[int, int], ...]
    time_s: float
    padding_tokens: int
    certificate: Certificate


def micro_batches(
    lengths: Sequence[int],
    seconds: Callable[[int, int], float],
    fits: Callable[[int, int], bool],
    stages: int,
) -> MicroBatches:
    """The cut of sorted sequences into micro-batches with the least ``Σ t + (p − 1)·max t``.

    Args:
        lengths: of all sequences.
        seconds: of one stage, for so many sequences of such a length.
        fits: whether so many sequences of such a length fit.
        stages: p.

    Raises:
        SpecError: there is no sequence.
        Infeasible: the longest sequence does not fit alone.

    >>> cut = micro_batches([1, 1, 4], lambda n, length: n * length + 1.0, lambda n, length: True, stages=1)
    >>> cut.cuts, cut.time_s  # 2 · 1 + 1, then 4 + 1; in one, padded, 3 · 4 + 1
    (((0, 2), (2, 3)), 8.0)
    """
    clock = Clock()
    if not lengths:
        raise SpecError(Problem("sequences", "none", "at least one"))
    ordered = sorted(lengths)
    n = len(ordered)
    price = np.full((n + 1, n + 1), np.inf)  # of the sequences from the first number to before the second
    for end in range(1, n + 1):
        for begin in range(end - 1, -1, -1):
            if not fits(end - begin, ordered[end - 1]):
                break
            price[begin, end] = seconds(end - begin, ordered[end - 1])
    if not np.isfinite(price[np.arange(n), np.arange(1, n + 1)]).all():
        raise Infeasible(Problem(f"sequences of {ordered[-1]:,} tokens", "do not fit alone", "a shorter one"))
    best, cuts = np.inf, ()  # type: tuple[float, tuple[tuple[int, int], ...]]
    limit = float(price[np.isfinite(price)].max())
    while (
        True
    ):  # the longest allowed falls to just below the longest used: no limit in between changes the answer
        total, found = _cut(np.where(price <= limit, price, np.inf))
        if not np.isfinite(total) or total >= best:  # the sum only grows as the limit falls
            break
        longest = max(float(price[cut]) for cut in found)
        if total + (stages - 1) * longest < best:
            best, cuts = total + (stages - 1) * longest, found
        below = price[price < longest]
        if not len(below):
            break
        limit = float(below.max())
    padding = sum((end - begin) * ordered[end - 1] - sum(ordered[begin:end]) for begin, end in cuts)
    return MicroBatches(cuts, best, padding, certify(best, best, "partition by dynamic programming", clock))


def _cut(price: Floats) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The cheapest cut of a row into pieces."""
    n = len(price) - 1
    cost, origin = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
    cost[0] = 0.0
    for end in range(1, n + 1):
        whole = cost[:end] + price[:end, end]
        origin[end] = int(whole.argmin())
        cost[end] = whole[origin[end]]
    pieces, end = [], n
    while end and np.isfinite(cost[n]):
        pieces.append((int(origin[end]), end))
        end = int(origin[end])
    return float(cost[n]), tuple(reversed(pieces))
