"""Checkmate: which tensors of a graph to keep and which to compute again, at the least time within memory.

What it does: finds the schedule of a layer's kernels with the least recomputation for a limit of memory, or the front of both;
    ``planner solve recompute``.
Saves: what is kept from forward to backward, tensor by tensor, where named recompute choices drop whole regions.
Costs: the kernels that run again.
Assumes: every kernel at most once between the first runs of two others; seconds and bytes add up.
Source: Jain et al. 2020 (Checkmate, arXiv:1910.02653) §4.
"""

from __future__ import annotations

from typing import Any

from planner.technique import Figure, Technique

_STEPS, _SNAPSHOTS = 10, 3


def _cheapest(graph: Any, budget_bytes: float) -> float:
    from planner.solve.combinatorial.recompute import cheapest_schedule

    return cheapest_schedule(graph, budget_bytes=budget_bytes).time_s


def _keep_all(graph: Any, budget_bytes: float) -> float:
    from planner.solve.combinatorial.recompute import keep_all

    return keep_all(graph).time_s


def _advances(subject: Any) -> float:
    """Forward steps to reverse a chain whose states overwrite one another, the first of which is given.

    Reversing a step needs the state before it. Of the snapshots one is the first state; the place of the state at hand takes
    its slot in memory.
    """
    from planner.solve.combinatorial.recompute import ComputeGraph

    forward = _STEPS - 1
    reads: list[tuple[int, ...]] = [(i - 1,) if i else () for i in range(forward)]
    for step in range(_STEPS, 0, -1):
        before = [len(reads) - 1] if step < _STEPS else []
        reads.append(tuple(sorted({*before, *([step - 2] if step > 1 else [])})))
    names = [f"step {i + 1}" for i in range(forward)] + [f"reverse {i}" for i in range(_STEPS, 0, -1)]
    sizes = [1.0] * forward + [0.0] * _STEPS
    graph = ComputeGraph(names, sizes, sizes, reads, in_place=frozenset(range(forward)))
    return float(subject(graph, float(_SNAPSHOTS)))


TECHNIQUE = Technique(
    key="checkmate",
    name="Checkmate",
    slot=None,
    kind="solver",
    source="arXiv:1910.02653",
    summary="The least recomputation within memory, tensor by tensor",
    figures=(
        Figure(
            "forward steps to reverse 10 with 3 snapshots, beside one in each reversal",
            15.0,
            1e-9,
            "github.com/firedrakeproject/checkpoint_schedules @8c489cb, multistage.py: optimal_extra_steps(10, 3) of revolve",
            _advances,
        ),
    ),
    solve=_cheapest,
    naive=_keep_all,
)
