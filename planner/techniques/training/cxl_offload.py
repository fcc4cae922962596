"""CXL memory beside a host's DRAM: states in DRAM as far as it goes, what streams in CXL memory.

What it does: saved activations (``activation_offload=cxl``) and weights (``parameter_offload=cxl``) live in CXL memory; states
    and gradients that the host updates (``optimizer_offload=cpu+cxl``) in DRAM, and what it has no room for in CXL memory.
Saves: DRAM for what the host's cores work on; jobs that exceed it without drives.
Costs: what streams passes host link and CXL memory, side by side; the part of an update whose states lie in CXL memory runs at
    that memory's rate.
Assumes: pages of what streams are spread over all cards, so that these are one memory with their rates together; every tensor
    has the same part in either memory, as on the device that holds most; nothing else is in DRAM.
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
from planner.techniques.training.activation_offload.vdnn import offload
from planner.techniques.training.optimizer_offload import gradients
from planner.techniques.training.parameter_offload.zero_infinity import trips_of
from planner.techniques.training.swap import cxl, swap

_STREAMS, _WEIGHTS, _STATES = "cxl_offload", "cxl_weights", "cxl_states"


def activations(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps saved tensors in CXL memory from forward to backward."""
    return offload(ledger, ctx, _STREAMS, "cxl")


def weights(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps weights in CXL memory, where an update on the device has to bring them back to."""
    return swap(ledger, trips_of(ledger), _WEIGHTS, tier="cxl")


def states_valid(ctx: Context) -> Iterable[Check]:
    """As on the host, and a second memory."""
    yield from gradients.valid(ctx)
    yield from cxl(ctx)


def states(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states, gradients and update to the host, and what exceeds its DRAM to CXL memory."""
    ledger = gradients.apply(ledger, ctx)
    most = np.maximum(_held_bytes(ledger, ctx), 1.0)
    over = np.maximum(1.0 - ctx.cluster.host_memory_bytes / most, 0.0)
    added: list[Item] = []

    def near(item: Item) -> Item | None:
        if isinstance(item, Resident) and item.tier == "host" and item.pool in ("optimizer", "gradients"):
            added.append(replace(item, size=times(item.size, "beyond_dram"), tier="cxl", by=_STATES))
        elif isinstance(item, Transfer) and item.tier == "host_memory":
            over_there = replace(
                item, what=f"{item.what}.cxl", size=times(item.size, "beyond_dram"), tier="cxl", by=_STATES
            )
            added.append(over_there)
        else:
            return None
        return replace(item, size=times(item.size, "in_dram"), by=_STATES)

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


def _checkpoints(subject: Pass) -> float:
    """Bytes in CXL memory of a recomputed layer's checkpoint, per token and unit of width."""
    ledger, ctx = figures.run(
        "activation_offload", subject, model="gpt2-xl", recompute="full", activation_offload="cxl"
    )
    held = [item for item in ledger.of(Resident, tier="cxl") if item.block not in ("embedding", "head")]
    return figures.total_bytes(ledger, held) / (2048 * ctx.model.hidden)


def _weight_bytes(subject: Pass) -> float:
    """Bytes of weights in CXL memory per parameter."""
    ledger, _ = figures.run(
        "parameter_offload", subject, model="gpt2-xl", precision="fp16", parameter_offload="cxl"
    )
    return figures.held_bytes(ledger, "parameters", tier="cxl") / figures.parameters(ledger)


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


_SOURCE = "Liaw and Chen 2025 (arXiv:2507.03305), the authors' allocator"
TECHNIQUES = (
    Technique(
        key=_STREAMS,
        name="Activation offload to CXL memory",
        slot="activation_offload",
        choices=("cxl",),
        searched=False,  # for hosts whose DRAM is too small for them
        source="arXiv:2507.03305",
        summary="Saved activations wait in CXL memory, DRAM is left to the optimizer",
        figures=(
            Figure(
                "bytes of a checkpoint in CXL memory per token and unit of width: batch · seq · hidden · layers · 2",
                2.0,
                1e-6,
                f"{_SOURCE} (numa_allocation_patch.py: activations_size, of the third level)",
                _checkpoints,
            ),
        ),
        valid=cxl,
        apply=activations,
    ),
    Technique(
        key=_WEIGHTS,
        name="Parameter offload to CXL memory",
        slot="parameter_offload",
        choices=("cxl",),
        searched=False,
        source="arXiv:2507.03305",
        summary="Weights live in CXL memory and come up block by block",
        figures=(
            Figure(
                "bytes of 16-bit weights in CXL memory per parameter",
                2.0,
                1e-6,
                f"{_SOURCE} (numa_allocation_patch.py: compute_weights_size, of the second level)",
                _weight_bytes,
            ),
        ),
        moves=("parameters",),
        valid=cxl,
        apply=weights,
    ),
    Technique(
        key=_STATES,
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
                f"{_SOURCE} (usage_tutorial.md, section 5: masks of LFM2.5-8B-A1B, the weights being the first that are split)",
                _in_dram,
            ),
        ),
        by_row=True,
        moves=("optimizer", "gradients"),
        valid=states_valid,
        apply=states,
    ),
)
