"""Recomputation of everything but attention: checkpoints behind the attention kernel as well as before the layer.

What it does: a layer runs forward again but for its attention kernel, whose output is kept; queries, keys and values are made
    again for its backward.
Saves: against full recomputation, one forward of the attention kernel, and what context parallelism sends for it.
Costs: the attention's output and log-sum-exp per layer, beside the layer's input.
Assumes: a fused kernel, whose backward needs queries, keys, values, output and log-sum-exp, and nothing of its inside.
Source: Li et al. 2024 (DistFlashAttn, arXiv:2310.03294) §3.3, rematerialisation-aware checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import AttentionCore, Item, Ledger, Resident
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import recompute

_KEY = "but_attention"


def valid(ctx: Context) -> Iterable[Check]:
    """A kernel whose inside is not kept."""
    yield Check(
        "recomputation of all but attention needs fused attention kernels",
        ctx.knobs["attention_kernel"] == "flash",
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Recomputes every block from its input and its attention's output."""

    def inside(item: Item) -> bool:
        return isinstance(item, Resident) or "core_attn" not in item.tags

    def keeps(item: Resident) -> bool:
        return "input" in item.tags or item.what.endswith((".core_output", ".log_sum_exp"))

    return recompute(ledger, inside, keeps, _KEY)


def _saved(subject: Pass) -> float:
    """Attention FLOP that run once instead of twice, over a forward's: of a layer of Llama 7B on 32K tokens."""
    ledger, _ = figures.run(
        "recompute", subject, model="llama-7b", seq=32768, attention_kernel="flash", recompute=_KEY
    )
    again = [item for item in ledger.items if item.phase == "recompute"]
    cores = [item for item in again if isinstance(item, AttentionCore)]
    return 1.0 if again and not cores else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Recomputation of everything but attention",
    slot="recompute",
    choices=(_KEY,),
    searched=False,  # where sequences are long enough for attention to be what full recomputation costs
    source="arXiv:2310.03294",
    summary="Layers run again from their input and their attention's output",
    figures=(
        Figure(
            "forward attention kernels of a layer that are not run again, of one",
            1.0,
            1e-9,
            "Li et al. 2024 (arXiv:2310.03294), section 3.3: the attention's forward is not recomputed",
            _saved,
        ),
    ),
    valid=valid,
    apply=apply,
)
