"""What pipelines in both directions share: two copies of every stage, whose gradients are added up.

Device r holds stage r of the pipeline that runs down and stage p−1−r of the one that runs up. Each copy updates itself,
after its gradients (summed over the data-parallel ranks already) have been summed with the other copy's. Source: Li,
Hoefler 2021 (Chimera, arXiv:2107.06925) §3.1, §3.3.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Group, Item, Ledger, Resident, times
from planner.schedule.order import Placement, Rule
from planner.technique import Context

__all__ = ["BIDIRECTIONAL", "EVEN_DEVICES", "EVEN_MICRO_BATCHES", "sum_copies"]

BIDIRECTIONAL = Placement(folded=True, copies=2)
EVEN_DEVICES = Rule("pp", "even", lambda p, m: p % 2 == 0)
EVEN_MICRO_BATCHES = Rule("micro_batches", "even", lambda p, m: m % 2 == 0)


def sum_copies(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds the all-reduce of each block's gradients between the two copies, half the pipeline apart on average."""
    pp = ctx.mesh.pp
    stride = ctx.mesh.group("pp").stride * np.maximum(pp // 2, 1)
    return ledger.add(_sums(ledger, ctx, Group("copies", np.where(pp > 1, 2.0, 1.0), stride)))


def _sums(ledger: Ledger, ctx: Context, copies: Group) -> Iterable[Item]:
    bucket = ctx.stack.gradient_bucket_bytes.value / dtype_bytes(ctx.gradient_dtype)
    for held in ledger.of(Resident, pool="gradients", lifetime="always"):
        yield Collective(
            what=f"{held.what}.copies", block=held.block, phase="step", tags=held.tags | {"data_parallel"}, by="chimera",
            source="arXiv:2107.06925", track="gradients", kind="all_reduce", group=copies, size=held.size,
            dtype=ctx.gradient_dtype, messages=times(held.size, f"/{bucket:.0f}"),
        )  # fmt: skip
