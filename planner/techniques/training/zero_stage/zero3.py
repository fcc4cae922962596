"""ZeRO stage 3: weights, gradients and optimizer states are sharded; weights are gathered when used.

What it does: every block's weights are gathered before its forward and again before its backward, and dropped after use;
    gradients are reduce-scattered per block. One block is one unit.
Saves: all states, divided by the replicas.
Costs: 3Ψ elements per micro-batch instead of 2Ψ per step; the gathered weights of the block at work and of the next one, and
    one block's whole gradients.
Assumes: a block's gathers run beside a block's work; an embedding or head has too little of it to hide its own.
Source: Rajbhandari et al. 2020 (arXiv:1910.02054) §5.3, §7.2.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import shard_everything


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards every state; gathers per block, forward and backward; reduces per block."""
    return shard_everything(ledger, ctx, "zero3")


def _volume(subject: Pass) -> float:
    """Elements sent per parameter and micro-batch, over the 2Ψ of data parallelism."""
    ledger, _ = figures.run("zero_stage", subject, model="gpt2-xl", dp=64, zero_stage="3")
    sent = figures.sent_elements(ledger, lambda item: "data_parallel" in item.tags)
    return sent / (2 * 63 / 64 * figures.parameters(ledger))


TECHNIQUE = Technique(
    key="zero3",
    name="ZeRO stage 3",
    slot="zero_stage",
    choices=("3",),
    source="arXiv:1910.02054",
    summary="All states sharded over the data-parallel ranks, weights gathered on use",
    figures=(
        Figure(
            "GB of model states, 7.5B parameters on 64 ranks",
            1.9,
            0.02,  # 1.875, printed with two digits
            "Rajbhandari et al. 2020 (arXiv:1910.02054), Figure 1",
            lambda subject: figures.zero_states_gb("3", subject),
        ),
        Figure(
            "elements sent, relative to data parallelism",
            1.5,
            1e-6,
            "Rajbhandari et al. 2020 (arXiv:1910.02054), section 7.2.2",
            _volume,
        ),
    ),
    apply=apply,
    active=lambda ctx: ctx.mesh.dp * ctx.mesh.cp > 1,
)
