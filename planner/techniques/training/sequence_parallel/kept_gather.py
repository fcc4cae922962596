"""Sequence parallelism that keeps what it gathers: a product's gathered input stays for the backward.

What it does: as Megatron's sequence parallelism, but the parts of a column-parallel input that come from other ranks are kept
    from forward to backward, where the weight gradient reads them.
Saves: the all-gather that repeats in the backward. Where blocks are recomputed, the recomputation's gather serves the backward.
Costs: b·s·h·(t − 1)/t elements per column-parallel input and micro-batch in flight.
Assumes: sequence divisible by tp; PyTorch's allocator keeps as much for tensors on their way as one layer sends.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §4.2.2, which gathers again instead; nanotron
    ``tp_recompute_allgather: false``; Calculon (doi:10.1145/3581784.3607102) ``seq_par_ag_redo: false``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Ledger, Resident, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.sequence_parallel import megatron_sp


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the residual stream; keeps the distant part of what would be gathered again."""
    ledger = megatron_sp.apply(ledger, ctx)
    again = [item for item in ledger.of(Collective) if "tp_regather" in item.tags]
    ledger = ledger.drop(lambda item: "tp_regather" in item.tags)
    kept = [megatron_sp.distant_input(item, ctx, "kept_gather") for item in again]
    several = (ctx.mesh.tp > 1).astype(float)
    return ledger.set_axes(tensor_ranks=several).add([*kept, *_recorded(ledger)])


def _recorded(ledger: Ledger) -> Iterator[Resident]:
    """What a layer's forward gathers and scatters: recorded on the communication's stream, and reused once that is through."""
    for item in ledger.of(Collective, phase="forward"):
        if item.tags & {"tp_gather", "tp_scatter"} and item.block != "head":
            yield Resident(
                what=f"{item.what}.recorded", block=item.block, tags=item.tags, by="kept_gather", pool="gathered",
                size=times(item.size, "tensor_ranks"), bytes_per_element=dtype_bytes(item.dtype), lifetime="apart",
            )  # fmt: skip


def _activation_bytes(subject: Pass) -> float:
    """Bytes saved per layer of GPT-3 175B in units of sbh, t = 8."""
    case: dict[str, Any] = {"model": "gpt3-175b", "seq": 2048, "tp": 8, "precision": "fp16"}
    ledger, _ = figures.run("sequence_parallel", subject, sequence_parallel="gathered", **case)
    return figures.saved_bytes(ledger) / (2048 * 12288)


TECHNIQUE = Technique(
    key="kept_gather",
    name="Sequence parallelism with kept inputs",
    slot="sequence_parallel",
    choices=("gathered",),
    searched=False,  # saves the slowdown of a hidden gather, for about twice the activations: half a percent where it fits
    source="doi:10.1145/3581784.3607102",
    summary="Residual stream sharded over the tensor-parallel ranks, gathered inputs kept for the backward",
    figures=(
        Figure(
            "bytes saved per layer of GPT-3 175B, t = 8, in sbh: (34 + 5as/h)/t, and the rest of two inputs of 2sbh",
            (34 + 5 * 96 * 2048 / 12288) / 8 + 2 * 2 * 7 / 8,
            1e-9,
            "Korthikanti et al. 2022 (arXiv:2205.05198), Table 2 and section 4.1 (inputs of the linear layers)",
            _activation_bytes,
        ),
    ),
    valid=megatron_sp.valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
