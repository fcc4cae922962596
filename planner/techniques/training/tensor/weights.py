"""What tensor ranks hold whole, and the gradients that they therefore have to sum.

A rank holds its part of every weight along a cut axis, and all of the others. Where ranks that hold the same weight each see
a part of the heads or of the sequence, each has a part of its gradient; they sum it once per optimizer step, in one message
per block (Megatron-LM ``finalize_model_grads``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from planner.ledger import Collective, Group, Ledger, Resident, role
from planner.technique import Context

__all__ = ["CUT", "REPLICATED_WHEN_FEW", "cut", "partial_gradients"]

CUT = ("heads", "ffn", "shared_ffn", "vocab", "ssm_inner", "ssm_heads")
"""Roles of the axes that are divided among the ranks."""

REPLICATED_WHEN_FEW = ("kv_heads", "ssm_groups")
"""Divided as well, but never below one per rank."""


def partial_gradients(
    ledger: Ledger, ctx: Context, group: Group, partial: Callable[[frozenset[str]], bool], what: str, by: str
) -> Iterator[Collective]:
    """One all-reduce per block of the gradients of those dense weights whose axes ``partial`` selects."""
    for item in ledger.of(Resident, pool="gradients"):
        terms = [term for term in item.size.split(" + ") if partial(frozenset(re.split(r"[*/]", term)))]
        if terms and "dense" in item.tags and item.block != "embedding":
            yield Collective(
                what=f"{what}_gradients.all_reduce", block=item.block, phase="step", tags=frozenset({"gradients", "tp_sum"}),
                by=by, source="Megatron-LM megatron/core/distributed/finalize_model_grads.py", kind="all_reduce", group=group,
                size=" + ".join(terms),
                dtype=ctx.gradient_dtype,
            )  # fmt: skip


def cut(axes: frozenset[str]) -> bool:
    """Whether a weight with these axes is divided among tensor ranks."""
    return any(role(axis) in CUT + REPLICATED_WHEN_FEW for axis in axes)
