"""ZeRO-Offload: optimizer states live in host memory, and the host's cores run the update.

What it does: moves optimizer states (master weights, moments) to the host; gradients go down, new weights come up.
Saves: the optimizer's device memory, and its update kernels.
Costs: gradients and weights of the rank's shard over the host link once per step; the update at host-memory bandwidth.
Assumes: the update is bandwidth-bound on the host (vectorised CPU Adam) and is not delayed by a step; transfers and update
    overlap neither with the backward nor with each other; accumulated gradients stay on the device.
Source: Ren et al. 2021 (arXiv:2101.06840) §3, §4; Megatron ``--optimizer-cpu-offload``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.costs.optimizer import FUSED_UPDATES
from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream, Transfer
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.swap import host

BOTH_WAYS = "down_and_up"


def valid(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to, and an update that it can run."""
    yield from host(ctx)
    yield Check(
        "the matrix products of Muon's update are not modelled on the host",
        ctx.knobs.get("optimizer") != "muon",
    )
    yield Check(
        "an update without gradients that last leaves no states to offload",
        ctx.knobs.get("optimizer") not in FUSED_UPDATES,
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states and update to the host."""
    moved = dtype_bytes(ctx.gradient_dtype) + dtype_bytes(ctx.format.activation)

    def offload(item: Resident) -> Item | None:
        return item.but(tier="host", by="zero_offload") if item.pool == "optimizer" else None

    added: list[Item] = []
    updates = [
        item
        for item in ledger.of(Stream)
        if {"update", "optimizer"} <= item.tags and "gradient_norm" not in item.tags
    ]
    for item in updates:
        common: dict[str, Any] = {
            "block": item.block, "phase": "step", "tags": item.tags | {"offload"}, "by": "zero_offload", "size": item.size,
        }  # fmt: skip
        added += [
            Transfer(what=f"{item.what}.{BOTH_WAYS}", bytes_per_element=moved, tier="host_link", **common),
            Transfer(
                what=f"{item.what}.on_host",
                bytes_per_element=item.bytes_per_element,
                tier="host_memory",
                **common,
            ),
        ]
    made = [item for item in ledger.of(Resident, lifetime="step") if "update" in item.tags]
    replaced = {*map(id, updates), *map(id, made)}
    return ledger.drop(lambda item: id(item) in replaced).edit(Resident, offload).add(added)


def _volume(subject: Pass) -> float:
    """Bytes over the host link per parameter and step, 16-bit weights and gradients."""
    ledger, _ = figures.run(
        "optimizer_offload",
        subject,
        model="gpt2-xl",
        precision="fp16",
        gradient_dtype="fp16",
        optimizer_offload="cpu",
    )
    return figures.transferred_bytes(ledger) / figures.parameters(ledger)


def _host_bytes(subject: Pass) -> float:
    """Bytes of optimizer states in host memory per parameter."""
    ledger, _ = figures.run(
        "optimizer_offload", subject, model="gpt2-xl", precision="fp16", optimizer_offload="cpu"
    )
    return figures.held_bytes(ledger, tier="host") / figures.parameters(ledger)


TECHNIQUE = Technique(
    key="zero_offload",
    name="ZeRO-Offload (optimizer states on the host)",
    slot="optimizer_offload",
    choices=("cpu",),
    source="arXiv:2101.06840",
    summary="Optimizer states and update on the host",
    moves=("optimizer",),
    knobs=(
        Knob(
            "optimizer_offload",
            "where optimizer states live and are updated",
            (
                "none",
                "cpu",
                "cpu+gradients",
                "cpu+overlapped",
                "cpu+cxl",
                "interleaved",
                "nvme",
                "nvme+overlapped",
            ),
            "none",
        ),
    ),
    figures=(
        Figure(
            "bytes over the host link per parameter and step: 4M",
            4.0,
            1e-6,
            "Ren et al. 2021 (arXiv:2101.06840), section 3: minimum communication volume",
            _volume,
        ),
        Figure(
            "bytes of fp32 weights, momentum and variance on the host per parameter",
            12.0,
            1e-6,
            "Ren et al. 2021 (arXiv:2101.06840), section 3: model states",
            _host_bytes,
        ),
    ),
    valid=valid,
    apply=apply,
)
