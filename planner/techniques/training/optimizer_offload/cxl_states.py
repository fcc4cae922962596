"""States in DRAM as far as it goes, then in CXL memory: the host's cores update what lies in either.

What it does: as ``cpu+gradients``; states and gradients that DRAM has no room for lie in CXL memory.
Saves: as ``cpu+gradients``, for jobs whose states exceed DRAM, without drives.
Costs: the part of sums and of the update that lies in CXL memory runs at that memory's rate, which all that lives there shares.
Assumes: as ``cpu+gradients``; every tensor has the same part in either memory, as on the device that holds most; nothing else
    is in DRAM; pages are spread over all cards, so that these are one memory with their rates together.
Source: Liaw and Chen 2025 (arXiv:2507.03305) §IV; github.com/DandinPower/CXL-Aware-LLM-Finetuning @222848b
    (``utils/cxl_aware_allocator.py``, ``utils/numa_allocation_patch.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from planner.ledger import Array, Item, Ledger, Resident, Transfer, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer_offload import gradients
from planner.techniques.training.swap import cxl

_KEY = "cxl_states"


def valid(ctx: Context) -> Iterable[Check]:
    """As on the host, and a second memory."""
    yield from gradients.valid(ctx)
    yield from cxl(ctx)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states, gradients and update to the host, and what exceeds its DRAM to CXL memory."""
    ledger = gradients.apply(ledger, ctx)
    most = np.maximum(_held_bytes(ledger, ctx), 1.0)
    over = np.maximum(1.0 - ctx.cluster.host_memory_bytes / most, 0.0)
    added: list[Item] = []

    def near(item: Item) -> Item | None:
        if isinstance(item, Resident) and item.tier == "host" and item.pool in ("optimizer", "gradients"):
            added.append(item.but(size=times(item.size, "beyond_dram"), tier="cxl", by=_KEY))
        elif isinstance(item, Transfer) and item.tier == "host_memory":
            over_there = item.but(
                what=f"{item.what}.cxl", size=times(item.size, "beyond_dram"), tier="cxl", by=_KEY
            )
            added.append(over_there)
        else:
            return None
        return item.but(size=times(item.size, "in_dram"), by=_KEY)

    return ledger.set_axes(beyond_dram=over, in_dram=1.0 - over).edit(Item, near).add(added)


def _held_bytes(ledger: Ledger, ctx: Context) -> Array:
    """Bytes of states and gradients on the host of the device that holds most: its layers, and the larger one of the ends."""
    repeats: dict[str, float] = {}
    for prefix, layers in (("encoder.", ctx.model.encoder_layers), ("", ctx.model.layers)):
        for name, repeat in layers:
            repeats[f"{prefix}{name}"] = repeats.get(f"{prefix}{name}", 0.0) + repeat
    each: dict[str, Array] = {}
    for item in ledger.of(Resident, tier="host", lifetime="always"):
        n_bytes = ledger.axes[item.size] * item.bytes_per_element
        each[item.block] = each.get(item.block, np.zeros(1)) + n_bytes
    within = sum(each.get(name, np.zeros(1)) * repeat for name, repeat in repeats.items())
    ends = [each.get(name, np.zeros(1)) for name in ("embedding", "head")]
    several = ctx.mesh.pp > 1
    return np.asarray(within / ctx.mesh.pp + np.where(several, np.maximum(*ends), sum(ends)))


def _in_dram(subject: Pass) -> float:
    """Tensors of momentum, variance, gradients and weights that 100 GiB of DRAM hold whole, of 8 billion parameters in fp32."""

    def with_dram(ledger: Ledger, ctx: Context) -> Ledger:
        n = sum(each * repeat for each, repeat in _parameters(ledger, ctx))
        dram = replace(
            ctx.cluster, host_memory_bytes=100 * 2**30 * n / 8e9, cxl_bytes=256 * 2**30, cxl_bytes_per_s=1e9
        )
        return subject(ledger, replace(ctx, cluster=dram))

    ledger, _ = figures.run("optimizer_offload", with_dram, model="gpt2-xl", optimizer_offload="cpu+cxl")
    share = figures.held_bytes(ledger, "optimizer", "gradients", tier="host") / max(
        sum(figures.held_bytes(ledger, "optimizer", "gradients", tier=tier) for tier in ("host", "cxl")), 1.0
    )
    return float(np.floor(4.0 * share))


def _parameters(ledger: Ledger, ctx: Context) -> list[tuple[float, float]]:
    """Trained parameters of each block, and how many there are of it."""
    repeats = {name: float(repeat) for name, repeat in ctx.model.layers}
    return [
        (float(np.ravel(ledger.axes[item.size])[0]), repeats.get(item.block, 1.0))
        for item in ledger.of(Resident, pool="gradients", lifetime="always")
    ]


TECHNIQUE = Technique(
    key=_KEY,
    name="Optimizer states in DRAM, then in CXL memory",
    slot="optimizer_offload",
    choices=("cpu+cxl",),
    searched=False,  # for states that exceed DRAM
    source="arXiv:2507.03305",
    summary="States and gradients in host DRAM as far as it goes, the rest in CXL memory",
    figures=(
        Figure(
            "fp32 tensors of four (momentum, variance, gradients, weights) that 100 GiB of DRAM hold whole, 8B parameters",
            3.0,
            1e-9,
            "Liaw and Chen 2025 (arXiv:2507.03305), their allocator's usage_tutorial.md, section 5: the weights are split",
            _in_dram,
        ),
    ),
    by_row=True,
    moves=("optimizer", "gradients"),
    valid=valid,
    apply=apply,
)
