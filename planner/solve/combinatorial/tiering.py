"""Where tensors rest between the kernels that use them: device memory, or a tier behind a link.

Kernels run in a fixed order and need what they use in the first tier. Between two uses a tensor rests in one tier; to
rest further out costs the way there and back, the way there nothing where the tier still has a copy. What persists from
step to step rests between its last use and its first one as well. Every tier has its capacity while every kernel runs.
One binary variable per rest and tier; the moves either stop the kernels (``serial``), or run beside them without end
(``overlapped``: the step is as long as the kernels or the busiest link).

Source: M. Hildebrand et al. 2020 (AutoTM, ASPLOS 2020, doi:10.1145/3373376.3378465) §3, its synchronous formulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import Infeasible, Problem
from planner.solve.combinatorial.certificate import Certificate, Clock, certify
from planner.solve.combinatorial.milp import Program, solve
from planner.units import format_bytes

__all__ = [
    "MOVES",
    "Gap",
    "Kernel",
    "Placement",
    "Rest",
    "Tensor",
    "Tier",
    "TieringProblem",
    "held_bytes",
    "link_s",
    "place",
    "rests_of",
    "swap_all",
    "too_large",
]

Floats: TypeAlias = NDArray[np.float64]

MOVES = ("serial", "overlapped")


@dataclass(frozen=True, slots=True)
class Tier:
    """A memory; rates are of the way from and to the first tier, which needs none."""

    name: str
    capacity_bytes: float
    read_bytes_per_s: float = np.inf
    write_bytes_per_s: float = np.inf


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor: ``persists`` from step to step, or lives from its first use to its last; ``constant`` ones are never written."""

    name: str
    size_bytes: float
    persists: bool = False
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: seconds with everything in the first tier, and the tensors that it uses, by number."""

    name: str
    time_s: float
    uses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rest:
    """A tensor between two uses: ``after`` one kernel and ``before`` the next (lower where it goes round), in ``tier``."""

    tensor: str
    after: str
    before: str
    tier: str
    move_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Rests outside the first tier, seconds of the step, and the most that every tier holds."""

    rests: tuple[Rest, ...]
    time_s: float
    kernels_s: float
    peak_bytes: dict[str, float]
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class TieringProblem:
    """Kernels in order, tensors and tiers (the first is the one that kernels use)."""

    kernels: tuple[Kernel, ...]
    tensors: tuple[Tensor, ...]
    tiers: tuple[Tier, ...]
    moves: str = "serial"


@dataclass(frozen=True, slots=True)
class Gap:
    """A tensor's rest behind one kernel and ahead of another, and the kernels in between."""

    tensor: int
    after: int
    before: int
    inside: tuple[int, ...]


def place(problem: TieringProblem, *, backend: str = "scipy", time_limit_s: float | None = None) -> Placement:
    """The placement with the shortest step.

    Raises:
        Infeasible: the tensors of one kernel do not fit in the first tier, or all tensors not in all tiers.
        SolverError: the integer program fails.
    """
    clock = Clock(time_limit_s)
    gaps = rests_of(problem)
    pinned = _pinned(problem)
    if max(pinned, default=0.0) > problem.tiers[0].capacity_bytes:
        raise too_large(problem)
    program = Program()
    serial = problem.moves == "serial"
    out, back = link_s(problem, gaps)
    rest = program.variables(out + back if serial else np.zeros_like(out), integer=True)
    if len(gaps):
        program.constrain(rest, 1.0, low=1.0, high=1.0)
    kernels_s = sum(kernel.time_s for kernel in problem.kernels)
    if not serial:
        longest = program.variables([1.0], upper=np.inf)
        program.constrain([longest], 1.0, low=kernels_s)
        for tier in range(1, len(problem.tiers)):
            for way in (out, back):
                if len(gaps):
                    columns = np.concatenate([rest[:, tier], longest])
                    program.constrain([columns], [np.append(way[:, tier], -1.0)], high=0.0)
    sizes = np.array([problem.tensors[gap.tensor].size_bytes for gap in gaps])
    unit = max(sizes.max(initial=0.0), 1.0)
    seen: set[tuple[int, bytes]] = set()
    for k in range(len(problem.kernels)):
        over = np.array([i for i, gap in enumerate(gaps) if k in gap.inside], dtype=int)
        for tier, memory in enumerate(problem.tiers):
            room = memory.capacity_bytes - (pinned[k] if tier == 0 else 0.0)
            key = (tier, over.tobytes() + np.float64(room).tobytes())
            if len(over) and np.isfinite(room) and key not in seen and sizes[over].sum() > room:
                program.constrain([rest[over, tier]], [sizes[over] / unit], high=room / unit)
            seen.add(key)
    answer = solve(program, backend=backend, time_limit_s=clock.left_s)
    if answer.status == "infeasible":
        raise too_large(problem)
    if not answer.found:
        found = swap_all(problem)
        bound = min(max(answer.bound + (kernels_s if serial else 0.0), kernels_s), found.time_s)
        return replace(
            found, certificate=certify(found.time_s, bound, f"swap all; bound of {answer.solver}", clock)
        )
    tiers = np.array([int(np.argmax(answer.values[columns])) for columns in rest], dtype=int)
    bound = answer.bound + (kernels_s if serial else 0.0)
    notes = {"rests": len(gaps), "rows": program.n_rows}
    return _evaluated(problem, gaps, tiers, bound, answer.solver, clock, notes)


def swap_all(problem: TieringProblem) -> Placement:
    """Everything goes out after every use, to the first tier with room: what a runtime without a plan does.

    Raises:
        Infeasible: the outer tiers have no room.
    """
    clock = Clock()
    gaps = rests_of(problem)
    free = [np.full(len(problem.kernels), tier.capacity_bytes) for tier in problem.tiers]
    tiers = np.zeros(len(gaps), dtype=int)
    for index, gap in enumerate(gaps):
        size, inside = problem.tensors[gap.tensor].size_bytes, list(gap.inside)
        fitting = [tier for tier in range(1, len(free)) if free[tier][inside].min() >= size]
        if not fitting:
            raise too_large(problem)
        tiers[index] = fitting[0]
        free[fitting[0]][inside] -= size
    if max(_pinned(problem)) > problem.tiers[0].capacity_bytes:
        raise too_large(problem)
    return _evaluated(problem, gaps, tiers, 0.0, "swap all", clock, {"rests": len(gaps)})


# -- details -----------------------------------------------------------------------------------------------------------------


def rests_of(problem: TieringProblem) -> list[Gap]:
    """Every rest that spans at least one kernel."""
    n = len(problem.kernels)
    found = []
    for number, tensor in enumerate(problem.tensors):
        if not tensor.size_bytes:
            continue
        uses = [k for k, kernel in enumerate(problem.kernels) if number in kernel.uses]
        pairs = list(pairwise(uses))
        if tensor.persists:
            pairs.append((uses[-1], uses[0]) if uses else (0, 0))
        for after, before in pairs:
            inside = (
                tuple(range(after + 1, before)) if after < before else (*range(after + 1, n), *range(before))
            )
            if not uses:
                inside = tuple(range(n))
            if inside:
                found.append(Gap(number, after, before, inside))
    return found


def _pinned(problem: TieringProblem) -> list[float]:
    """What the first tier holds for every kernel: what it uses."""
    return [sum(problem.tensors[t].size_bytes for t in set(kernel.uses)) for kernel in problem.kernels]


def held_bytes(problem: TieringProblem, gaps: Sequence[Gap], tiers: NDArray[np.intp]) -> Floats:
    """Bytes per tier and kernel of a choice of tiers: what the kernel uses in the first, and what rests meanwhile in each."""
    held = np.zeros((len(problem.tiers), len(problem.kernels)))
    held[0] = _pinned(problem)
    for gap, tier in zip(gaps, tiers, strict=True):
        held[tier, list(gap.inside)] += problem.tensors[gap.tensor].size_bytes
    return held


def link_s(problem: TieringProblem, gaps: Sequence[Gap]) -> tuple[Floats, Floats]:
    """Seconds out to every tier and back, per rest; a constant tensor has its copy outside already, an unused one never moves."""
    out, back = np.zeros((len(gaps), len(problem.tiers))), np.zeros((len(gaps), len(problem.tiers)))
    for row, gap in enumerate(gaps):
        tensor = problem.tensors[gap.tensor]
        for column, tier in enumerate(problem.tiers[1:], 1):
            out[row, column] = 0.0 if tensor.constant else tensor.size_bytes / tier.write_bytes_per_s
            back[row, column] = tensor.size_bytes / tier.read_bytes_per_s
            if len(gap.inside) == len(problem.kernels):
                out[row, column] = back[row, column] = 0.0
    return out, back


def _evaluated(
    problem: TieringProblem, gaps: Sequence[Gap], tiers: NDArray[np.intp], bound: float, solver: str, clock: Clock,
    notes: dict[str, int],
) -> Placement:  # fmt: skip
    """Time and memory of a choice of tiers."""
    out, back = link_s(problem, gaps)
    at = np.arange(len(gaps)), tiers
    kernels_s = sum(kernel.time_s for kernel in problem.kernels)
    if problem.moves == "serial":
        time_s = kernels_s + float((out[at] + back[at]).sum())
    else:
        links = [
            float(way[tiers == tier, tier].sum())
            for tier in range(1, len(problem.tiers))
            for way in (out, back)
        ]
        time_s = max([kernels_s, *links])
    held = held_bytes(problem, gaps, tiers)
    rests = tuple(
        Rest(
            problem.tensors[gap.tensor].name, problem.kernels[gap.after].name, problem.kernels[gap.before].name,
            problem.tiers[tier].name, float(out[row, tier] + back[row, tier]),
        )
        for row, (gap, tier) in enumerate(zip(gaps, tiers, strict=True))
        if tier > 0
    )  # fmt: skip
    peaks = {tier.name: float(line.max(initial=0.0)) for tier, line in zip(problem.tiers, held, strict=True)}
    certificate = certify(time_s, min(max(bound, kernels_s), time_s), solver, clock, notes)
    return Placement(rests, time_s, kernels_s, peaks, certificate)


def too_large(problem: TieringProblem) -> Infeasible:
    """The error of a problem whose tensors fit nowhere."""
    largest = max(_pinned(problem))
    total = sum(tensor.size_bytes for tensor in problem.tensors)
    room = sum(tier.capacity_bytes for tier in problem.tiers)
    return Infeasible(
        Problem(
            "tiers", f"one kernel uses {format_bytes(largest)}, all tensors are {format_bytes(total)}",
            f"at most {format_bytes(problem.tiers[0].capacity_bytes)} in {problem.tiers[0].name} at once, and "
            f"{format_bytes(room)} in all tiers",
        )
    )  # fmt: skip
