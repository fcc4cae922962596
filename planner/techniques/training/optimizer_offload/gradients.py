"""ZeRO-Offload with gradients on the host: they go down while the backward runs, and accumulate there.

What it does: as ``cpu``; besides, every block's gradients leave the device as soon as its backward has made them, in every
    micro-batch, and the host adds them up.
Saves: the optimizer's and the gradients' device memory: weights in use remain, 2 of 16 bytes per parameter.
Costs: gradients over the host link in every micro-batch, beside the backward; the host reads and writes its sum of them for every
    micro-batch but the first; new weights come up once per step.
Assumes: one block's gradients and those of the block before it are on the device at once; sharded gradients (ZeRO stages 2 and
    3) where there are several replicas, so that each rank sends its share.
Source: Ren et al. 2021 (arXiv:2101.06840) §3.2, §4.1; DeepSpeed ``offload_optimizer``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Transfer, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer_offload import zero_offload

_KEY = "zero_offload_gradients"
_STAGES = 2.0  # of the block at work, and of the one whose gradients are going down


def valid(ctx: Context) -> Iterable[Check]:
    """As the offloaded optimizer; every rank has gradients of its own."""
    yield from zero_offload.valid(ctx)
    beside = ctx.knobs.get("gradient_accumulation") != "in_place"
    yield Check("gradients in place of weights stay until the update, and cannot be sent early", beside)
    shared = ctx.knobs.get("zero_stage", "2") in ("2", "3", "fsdp")
    yield Check(
        "gradients on the host need ZeRO stage 2 or 3, or one replica",
        shared | (ctx.mesh.dp * ctx.mesh.cp == 1),
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states, update and gradients to the host."""
    ledger = zero_offload.apply(ledger, ctx)
    width, weight = dtype_bytes(ctx.format.activation), dtype_bytes(ctx.format.activation)
    added = [new for held in _gradients(ledger) for new in _sent(held, ctx, width)]

    def moved(item: Resident) -> Item | None:
        held = item.pool == "gradients" and item.lifetime == "always"
        return item.but(tier="host", by=_KEY) if held else None

    def only_up(item: Transfer) -> Item | None:
        if not item.what.endswith(zero_offload.BOTH_WAYS):
            return None
        what = item.what.replace(zero_offload.BOTH_WAYS, "up")
        return item.but(what=what, bytes_per_element=weight, by=_KEY)

    again = np.asarray(1.0 - 1.0 / ctx.micro_batches)  # the first micro-batch's gradients are the sum
    return ledger.edit(Resident, moved).edit(Transfer, only_up).set_axes(accumulated=again).add(added)


def _gradients(ledger: Ledger) -> list[Resident]:
    return ledger.of(Resident, pool="gradients", lifetime="always")


def _sent(held: Resident, ctx: Context, width: float) -> Iterator[Item]:
    common: dict[str, Any] = {"block": held.block, "tags": held.tags | {"offload"}, "by": _KEY}
    down: dict[str, Any] = {"phase": "backward", "track": "host", **common}
    yield Transfer(what=f"{held.what}.down", size=held.size, bytes_per_element=width, **down)
    sums = width + 2.0 * dtype_bytes(ctx.gradient_dtype)
    yield Transfer(
        what=f"{held.what}.accumulate",
        size=times(held.size, "accumulated"),
        bytes_per_element=sums,
        tier="host_memory",
        **down,
    )
    yield Resident(
        what=f"{held.what}.staging",
        size=held.size,
        bytes_per_element=_STAGES * width,
        pool="buffers",
        lifetime="block",
        **common,
    )


def _device_bytes(subject: Pass) -> float:
    """Bytes of model states on the device per parameter, 16-bit gradients."""
    case: dict[str, Any] = {"model": "gpt2-xl", "precision": "fp16", "gradient_dtype": "fp16"}
    whole, _ = figures.run("optimizer_offload", lambda ledger, ctx: ledger, **case)
    ledger, _ = figures.run("optimizer_offload", subject, optimizer_offload="cpu+gradients", **case)
    return figures.held_bytes(ledger) / figures.parameters(whole)


TECHNIQUE = Technique(
    key=_KEY,
    name="ZeRO-Offload with gradients on the host",
    slot="optimizer_offload",
    choices=("cpu+gradients",),
    searched=False,  # for jobs whose weights fit and whose gradients do not: few layers of a large model on few devices
    source="arXiv:2101.06840",
    summary="Gradients go to the host during the backward; states and update are there",
    figures=(
        Figure(
            "bytes of model states on the device per parameter: 2M of 16M, an eighth",
            2.0,
            1e-6,
            "Ren et al. 2021 (arXiv:2101.06840), section 3.3: fp16 parameters stay, 8x less GPU memory",
            _device_bytes,
        ),
    ),
    by_row=True,
    moves=("optimizer", "gradients"),
    valid=valid,
    apply=apply,
)
