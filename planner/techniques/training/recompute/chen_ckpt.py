"""Full recomputation (activation checkpointing): keep a block's input, run its forward again in the backward.

What it does: ``full`` recomputes every block; ``block`` only ``recompute_layers`` blocks of each stage.
Saves: all activations of a recomputed block but its input (2sbh bytes of 16-bit activations).
Costs: one more forward of every recomputed block, its activation collectives included; the activations of one block while it
    is at work. Weights that are sharded are gathered for the backward anyway.
Assumes: the checkpointed region is the whole block, as launchers do it.
Source: Chen et al. 2016 (arXiv:1604.06174); Megatron ``--recompute-granularity full``.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Collective, Item, Ledger, Resident
from planner.technique import Context, Knob, Technique

_OUTSIDE = ("embedding", "head")  # not part of any layer


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Copies each block's forward, and keeps its activations only while it is at work."""

    def again(item: Item) -> bool:
        moves_weights = isinstance(item, Collective) and "data_parallel" in item.tags
        return item.phase == "forward" and item.block not in _OUTSIDE and not moves_weights

    def drop(item: Resident) -> Item | None:
        if "saved" not in item.tags or "input" in item.tags or item.block in _OUTSIDE:
            return None
        return replace(item, lifetime="recomputed", by="chen_ckpt")

    return ledger.copy_to_phase(again, "recompute", "chen_ckpt").edit(Resident, drop)


TECHNIQUE = Technique(
    key="chen_ckpt",
    name="Full recomputation (activation checkpointing)",
    slot="recompute",
    choices=("full", "block"),
    source="arXiv:1604.06174",
    summary="Blocks keep their input only and run forward again",
    knobs=(
        Knob(
            "recompute", "what is recomputed in the backward", ("none", "selective", "full", "block"), "none"
        ),
        Knob("recompute_layers", "layers recomputed per stage (recompute=block)"),
    ),
    apply=apply,
)
