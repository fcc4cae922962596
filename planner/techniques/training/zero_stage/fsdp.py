"""Fully sharded data parallelism with fp32 shards: ZeRO stage 3 without 16-bit copies between uses.

What it does: each rank holds fp32 shards of weights, gradients and moments; a block's weights are cast and gathered in 16 bits
    when used, forward and backward, and dropped after use; gradients are reduce-scattered per block. One block is one unit.
Saves: all states, divided by the replicas; 2 bytes per parameter less than stage 3 with separate master weights.
Costs: 3Ψ elements per micro-batch; the gathered weights of the block at work and of the next one, and one block's whole
    gradients.
Assumes: a block's gathers run beside a block's work; two gathers are in flight at most (the rate limiter).
Source: Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277) §3.2, §3.4.
"""

from __future__ import annotations

from planner.ledger import Ledger, Resident
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import shard_everything


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards every state; the master weights serve as the sharded weights."""
    ledger = shard_everything(ledger, ctx, "fsdp")
    if not any(item.what.endswith("master_weights") for item in ledger.of(Resident, pool="optimizer")):
        return ledger  # nothing else holds the weights
    return ledger.drop(
        lambda i: (
            isinstance(i, Resident)
            and i.pool == "parameters"
            and i.lifetime == "always"
            and "frozen" not in i.tags
        )
    )


def _states(subject: Pass) -> float:
    """Bytes of sharded states per parameter, times the shard degree."""
    ledger, _ = figures.run("zero_stage", subject, model="gpt2-xl", dp=16, zero_stage="fsdp")
    return 16 * figures.held_bytes(ledger) / figures.parameters(ledger)


def _volume(subject: Pass) -> float:
    """Elements sent per parameter and micro-batch, 512 ranks."""
    ledger, _ = figures.run("zero_stage", subject, model="gpt2-xl", dp=512, zero_stage="fsdp")
    return figures.sent_elements(ledger, lambda item: "data_parallel" in item.tags) / figures.parameters(
        ledger
    )


TECHNIQUE = Technique(
    key="fsdp",
    name="Fully sharded data parallelism (FSDP, fp32 shards)",
    slot="zero_stage",
    choices=("fsdp",),
    searched=False,  # stage 3 with two bytes less per parameter: a launcher's matter, not a layout's
    source="arXiv:2304.11277",
    summary="fp32 shards of all states, 16-bit weights gathered on use",
    figures=(
        Figure(
            "elements sent per parameter and micro-batch, W = 512: 3(W − 1)/W",
            2.99414,
            1e-4,
            "Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), section 3.2.2",
            _volume,
        ),
        Figure(
            "bytes of fp32 weights, gradients and Adam moments per parameter",
            16.0,
            1e-6,
            "Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), section 4.4: fp32 shards, 16-bit collectives",
            _states,
        ),
    ),
    apply=apply,
    active=lambda ctx: ctx.mesh.dp * ctx.mesh.cp > 1,
)
