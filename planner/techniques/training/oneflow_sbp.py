"""Split, broadcast, partial: every tensor has a layout along every mesh axis, and a collective for every change of it.

What it does: names layouts and prices their changes; what shardings of operators are chosen by (``planner solve sharding``).
Saves: nothing by itself.
Costs: (p − 1)/p·T to gather or to reduce and scatter, 2(p − 1)/p·T to reduce, (p − 1)/p²·T to split along another dimension.
Assumes: changes go axis by axis, with the collectives of the engine.
Source: Yuan et al. 2021 (OneFlow, arXiv:2110.15032) §3.2, Table 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.costs.resharding import PARTIAL, WHOLE, reshard_bytes
from planner.technique import Figure, Technique

_RANKS = 4


def _gather_always(source: str, target: str, n_bytes: Any, group: Any) -> Any:
    """Everything to everybody, whatever the layouts."""
    return n_bytes * (group - 1)


def _figure(what: str, source: str, target: str, published: float) -> Figure:
    def compute(subject: Callable[..., Any]) -> float:
        return _RANKS * float(subject(source, target, 1.0, _RANKS))

    where = "Yuan et al. 2021 (arXiv:2110.15032), Table 2, p = 4"
    return Figure(f"bytes per byte that all devices move, {what}", published, 1e-9, where, compute)


TECHNIQUE = Technique(
    key="oneflow_sbp",
    name="OneFlow SBP",
    slot=None,
    kind="solver",
    source="arXiv:2110.15032",
    summary="Layouts of tensors, and the collectives between them",
    figures=(
        _figure("partial to broadcast: 2(p − 1)", PARTIAL, WHOLE, 2.0 * (_RANKS - 1)),
        _figure("split to another split: (p − 1)/p", "rows", "columns", (_RANKS - 1) / _RANKS),
    ),
    solve=reshard_bytes,
    naive=_gather_always,
)
