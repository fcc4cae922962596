"""Optimizer states and gradients on NVMe: the host's cores update what passes through host memory.

What it does: as ``cpu+gradients``, with states and gradients on the drives. Gradients are written as the backward makes them; the
    update reads them and the states, and writes the states back.
Saves: the optimizer's and the gradients' memory, on the device and on the host.
Costs: 32 bytes per parameter and step over the rank's share of the drives with fp32 gradients; where gradients accumulate, theirs
    are read and written in every micro-batch; the update waits for reads, arithmetic and writes in turn.
Assumes: as ``cpu+gradients``; buffers in host memory are small.
Source: Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857) §4.1, §5.1.1; DeepSpeed ``offload_optimizer: nvme`` without
    ``pipeline_read`` and ``pipeline_write``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Transfer, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer_offload import gradients
from planner.techniques.training.swap import nvme

_KEY = "zero_infinity_states"


def valid(ctx: Context) -> Iterable[Check]:
    """As on the host, and drives."""
    yield from gradients.valid(ctx)
    yield from nvme(ctx)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states, update and gradients to the host, and what is held there to the drives."""
    ledger = gradients.apply(ledger, ctx)
    held = [
        item
        for item in ledger.of(Resident, tier="host", lifetime="always")
        if item.pool in ("optimizer", "gradients")
    ]
    moved = {id(item) for item in held}

    def away(item: Resident) -> Item | None:
        return item.but(tier="nvme", by=_KEY) if id(item) in moved else None

    return ledger.edit(Resident, away).add(new for item in held for new in _traffic(item, ctx))


def _traffic(held: Resident, ctx: Context) -> Iterator[Item]:
    """Gradients: written in every micro-batch, read again but in the first, and by the update. States: there and back."""
    update = Transfer(
        what=f"{held.what}.read", block=held.block, phase="step", tags=held.tags | {"offload"}, by=_KEY, size=held.size,
        bytes_per_element=held.bytes_per_element, tier="nvme",
    )  # fmt: skip
    yield update
    if held.pool == "optimizer":
        yield replace(update, what=f"{held.what}.write")
        return
    width = dtype_bytes(ctx.gradient_dtype)
    made = replace(update, phase="backward", track="nvme", bytes_per_element=width)
    yield replace(made, what=f"{held.what}.write")
    yield replace(made, what=f"{held.what}.read_again", size=times(held.size, "accumulated"))


def _step_bytes(subject: Pass) -> float:
    """Bytes over the drives per parameter of a step with one micro-batch and fp32 gradients."""
    ledger, _ = figures.run(
        "optimizer_offload", subject, model="gpt2-xl", precision="fp16", optimizer_offload="nvme"
    )
    whole, _ = figures.run("optimizer_offload", lambda ledger, ctx: ledger, model="gpt2-xl", precision="fp16")
    return figures.transferred_bytes(ledger, "nvme") / figures.parameters(whole)


TECHNIQUE = Technique(
    key=_KEY,
    name="Optimizer states and gradients on NVMe (ZeRO-Infinity)",
    slot="optimizer_offload",
    choices=("nvme",),
    searched=False,  # for models whose states exceed host memory
    source="arXiv:2104.07857",
    summary="States and gradients live on drives; the host updates what passes through",
    figures=(
        Figure(
            "bytes moved per parameter and step: 8·s·b FLOP at an intensity of s·b/4 FLOP per byte",
            32.0,
            1e-6,
            "Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857), section 4.1: 2·16 bytes read and written",
            _step_bytes,
        ),
    ),
    by_row=True,
    moves=("optimizer", "gradients"),
    valid=valid,
    apply=apply,
)
