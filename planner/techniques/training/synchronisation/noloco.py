"""NoLoCo: local training whose workers average with one random partner instead of all.

What it does: as DiLoCo, but every ``inner_steps`` steps a worker exchanges weights and outer change with one other.
Saves: the all-reduce between workers: two messages whatever their number, and nobody waits for all.
Costs: as DiLoCo; workers agree only in the long run.
Assumes: both tensors travel in fp32, one after the other; a random partner is as far as any.
Source: Kolehmainen et al. 2025 (arXiv:2506.10911) §3.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Array, Item, Ledger, Resident
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.synchronisation.local import apart, local, outer_traffic, workers_checks

_KEY = "noloco"
_TENSORS = 2.0  # weights and outer change


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Averages with a partner once in a while."""

    def exchange(weights: Resident, workers: Array) -> Iterable[Item]:
        yield outer_traffic(weights, ctx, "point_to_point", workers, _KEY, _TENSORS)

    return local(ledger, ctx, _KEY, 2.0, exchange)


def _faster(subject: Pass) -> float:
    """Messages of an agreement by a tree's reduction and broadcast of 1,000 workers, over those with a partner."""
    ledger, _ = figures.run(
        "synchronisation", subject, model="gpt2", dp=1000, zero_stage="0", synchronisation=_KEY, sync_workers=1000,
        inner_steps=1, cluster="a100-sxm-80gb:1000x1",
    )  # fmt: skip
    sent = figures.sent_elements(ledger, lambda i: i.kind == "point_to_point" and "outer" in i.tags)
    messages = sent / figures.parameters(ledger)
    return 2.0 * float(np.log2(1000)) / messages if messages else 1.0


TECHNIQUE = Technique(
    key=_KEY,
    name="NoLoCo (local steps, averaging in pairs)",
    slot="synchronisation",
    choices=(_KEY,),
    source="arXiv:2506.10911",
    summary="Workers average in random pairs every few hundred steps",
    figures=(
        Figure(
            "times faster agreement of 1,000 workers than a tree's all-reduce: an order of magnitude",
            10.0,
            0.01,  # 2·log2(1000) messages against 2
            "Kolehmainen et al. 2025 (arXiv:2506.10911), abstract and section 5 (latency); gensyn.ai/articles/noloco",
            _faster,
        ),
    ),
    needs=("staleness",),
    valid=workers_checks,
    apply=apply,
    active=apart,
)
