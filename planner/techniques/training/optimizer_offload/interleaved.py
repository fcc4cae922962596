"""Deep Optimizer States: of the states on the host, every k-th part is updated on the device.

What it does: states live on the host; while its cores update most of them, every k-th part goes up, is updated by the device,
    and goes back. k makes both sides finish together.
Saves: the optimizer's device memory, but for the parts under way; of the host's update, one part in k.
Costs: states of that part over the host link both ways, in the shadow of the host's update; gradients and weights as ``cpu``.
Assumes: parts small enough for an even split; the device's share is hidden behind the host's, and two parts are on the device.
Source: Maurya et al. 2024 (arXiv:2410.21316) §4.
"""

from __future__ import annotations

import numpy as np

from planner.costs.offload import interleaved_update_stride
from planner.ledger import Item, Ledger, Resident, Transfer, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer_offload import zero_offload

_KEY = "deep_optimizer_states"
_PART = 1e8  # parameters of a part: DeepSpeed's sub_group_size in the paper's experiments


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states to the host, and part of their update back."""
    states = sum(item.bytes_per_element for item in _states(ledger, "dense"))
    parameters = sum(
        ledger.axes[item.size] for item in ledger.of(Resident, pool="parameters", lifetime="always")
    )
    ledger = zero_offload.apply(ledger, ctx)
    stride = _stride(ledger, ctx, states)

    def on_host(item: Transfer) -> Item | None:
        if item.tier != "host_memory" or item.phase != "step":
            return None
        return item.but(size=times(item.size, "updated_on_host"), by=_KEY)

    buffers = [
        item.but(what=f"{item.what}.part", tier="device", pool="workspace", lifetime="step", by=_KEY,
                size=times(item.size, "part"), bytes_per_element=2.0 * item.bytes_per_element)
        for item in ledger.of(Resident, pool="optimizer", tier="host")
    ]  # fmt: skip
    part = np.minimum(_PART / np.maximum(parameters, 1.0), 1.0)
    return ledger.edit(Transfer, on_host).set_axes(updated_on_host=1.0 - 1.0 / stride, part=part).add(buffers)


def _states(ledger: Ledger, mesh: str) -> list[Resident]:
    held = [item for item in ledger.of(Resident, pool="optimizer", lifetime="always") if mesh in item.tags]
    return [item for item in held if item.block == held[0].block]


def _stride(ledger: Ledger, ctx: Context, states: float) -> float:
    """k, from what one parameter takes: on the host, on the device, and its states over the link both ways."""
    moved = max(
        (i.bytes_per_element for i in ledger.of(Transfer, tier="host_memory") if i.phase == "step"),
        default=0.0,
    )
    cluster = ctx.cluster
    return float(
        interleaved_update_stride(
            moved / cluster.host_memory_bytes_per_s,
            moved / float(cluster.device.memory_bytes_per_s),
            2.0 * states / cluster.host_link_bytes_per_s,
        )
    )


def _host_share(subject: Pass) -> float:
    """Bytes that the host's cores move in an update, over those of an update on the host alone."""
    ledger, _ = figures.run(
        "optimizer_offload", subject, model="gpt2-xl", optimizer_offload="interleaved", cluster="h100-sxm:1x8"
    )
    whole, _ = figures.run(
        "optimizer_offload",
        zero_offload.apply,
        model="gpt2-xl",
        optimizer_offload="cpu",
        cluster="h100-sxm:1x8",
    )
    moved = [figures.transferred_bytes(of, "host_memory") for of in (ledger, whole)]
    return moved[0] / moved[1]


TECHNIQUE = Technique(
    key=_KEY,
    name="Deep Optimizer States (interleaved updates)",
    slot="optimizer_offload",
    choices=("interleaved",),
    searched=False,  # the host's update pays only where states must go; then it is cpu with less of it
    source="arXiv:2410.21316",
    summary="Every k-th part of the offloaded states is updated on the device",
    figures=(
        Figure(
            "host's share of the update, 30 B per parameter at 76.8 GB/s, 3.35 TB/s on the device, 24 B at 63 GB/s: 1 − 1/k",
            (24 / 63e9 + 30 / 3.35e12) / (30 / 76.8e9 + 24 / 63e9 + 30 / 3.35e12),
            0.02,
            "Maurya et al. 2024 (arXiv:2410.21316), section 4: the stride balances host updates against transfers",
            _host_share,
        ),
    ),
    moves=("optimizer",),
    valid=zero_offload.valid,
    apply=apply,
)
