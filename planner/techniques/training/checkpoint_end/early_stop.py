"""Recomputation that stops early: once every saved tensor is there again, the rest of the block's forward is not run.

What it does: leaves out the product behind the last tensor that a dense block saves, and the addition to the residual stream
    (under tensor parallelism the sum between them as well): their results are what the next block saved as its input.
Saves: a feed-forward network's last product in every recomputed block.
Costs: nothing.
Assumes: the network ends the block; norms behind it, mixtures of experts and state-space mixers run to their end.
Source: PyTorch ``torch.utils.checkpoint`` (``use_reentrant=False``, ``early_stop``), on by default since release 2.1.
"""

from __future__ import annotations

from planner.ledger import Item, Ledger, Resident
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.recompute.again import UNREAD

_KEY = "early_stop"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Marks what follows the last saved tensor of each block."""
    ends = {
        name
        for name, block in ctx.model.blocks.items()
        if block.mlp is not None and block.moe is None and block.norms <= 2 and not block.parallel
    }

    def mark(item: Item) -> Item | None:
        unread = (
            item.phase == "forward"
            and not isinstance(item, Resident)
            and item.block.removeprefix("encoder.") in ends
            and item.what.startswith(("mlp.fc2", "mlp.add"))
        )
        return item.but(tags=item.tags | {UNREAD}) if unread else None

    return ledger.edit(Item, mark)


def _again(subject: Pass) -> float:
    """FLOP of the products of a recomputed block, relative to those of its forward."""
    ledger, _ = figures.run("checkpoint_end", subject, model="gpt2-xl", seq=1024, recompute="full")
    dense = (lambda item: "core_attn" not in item.tags,)
    again, forward = (figures.flop(ledger, phase, where=dense[0]) for phase in ("recompute", "forward"))
    return again / forward


TECHNIQUE = Technique(
    key=_KEY,
    name="Recomputation that stops early",
    slot="checkpoint_end",
    choices=("early_stop",),
    searched=False,
    asked=True,  # what a framework does: its stack says so
    source="PyTorch torch/utils/checkpoint.py",
    summary="A recomputed block leaves out what follows its last saved tensor",
    knobs=(Knob("checkpoint_end", "where a recomputation stops", ("whole", "early_stop"), "whole"),),
    figures=(
        Figure(
            "products of a GPT block that run again, of its forward's: 12h² less the last 4h²",
            8 / 12,
            1e-9,
            "torch.utils.checkpoint.set_checkpoint_early_stop: stops as soon as all needed tensors are computed",
            _again,
        ),
    ),
    apply=apply,
)
