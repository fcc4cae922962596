"""Parameter offload: weights live in host memory and come up block by block.

What it does: every rank brings its shard of the next block's weights up while the current block works, forward and backward;
    updated weights go back once per step.
Saves: weights on the device, save for two blocks' worth.
Costs: the weights over the host link twice per micro-batch and once per step.
Assumes: transfers run beside the previous block; ranks bring up disjoint shards when weights are sharded (bandwidth-centric
    placement); a block's recomputation shares the fetch of its backward; gradients stay on the device.
Source: Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857) §4.1, §5.1, §6.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Item, Ledger, Phase, Resident, Transfer
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_TRIPS: tuple[tuple[str, Phase, str], ...] = (
    ("fetch", "forward", "host"),
    ("fetch", "backward", "host"),
    ("store", "step", "main"),
)


def valid(ctx: Context) -> Iterable[Check]:
    """There must be a host to offload to."""
    yield Check("no host memory is described for this cluster", ctx.cluster.host_memory_bytes > 0)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves weights to the host; adds the traffic and the staging buffers."""
    added: list[Item] = []

    def offload(item: Resident) -> Item | None:
        if item.pool != "parameters" or item.lifetime != "always":
            return None
        # Where the update runs on the host, the new weights are there already.
        updated_on_host = any(
            o.tier == "host" and o.block == item.block for o in ledger.of(Resident, pool="optimizer")
        )
        added.extend(
            Transfer(
                what=f"{item.what}.{what}", block=item.block, phase=phase, tags=item.tags | {"offload"}, by="zero_infinity",
                track=track, size=item.size, bytes_per_element=item.bytes_per_element,
            )
            for what, phase, track in _TRIPS[: 2 if updated_on_host else 3]
        )  # fmt: skip
        staged = 2 * item.bytes_per_element
        staging = replace(
            item, what=f"{item.what}.staging", lifetime="block", pool="buffers", bytes_per_element=staged
        )
        added.append(replace(staging, by="zero_infinity"))
        return replace(item, tier="host", by="zero_infinity")

    return ledger.edit(Resident, offload).add(added)


def _fetches(subject: Pass) -> float:
    """Times that the weights come up per micro-batch."""
    ledger, _ = figures.run(
        "parameter_offload", subject, model="gpt2-xl", zero_stage="3", dp=8, parameter_offload="cpu"
    )
    fetched = [item for item in ledger.of(Transfer) if item.phase != "step"]
    return (
        8
        * figures.transferred_bytes(replace(ledger, items=tuple(fetched)))
        / (2 * figures.parameters(ledger))
    )


TECHNIQUE = Technique(
    key="zero_infinity",
    name="Parameter offload (ZeRO-Infinity)",
    slot="parameter_offload",
    choices=("cpu",),
    source="arXiv:2104.07857",
    summary="Weights live in host memory and come up block by block",
    knobs=(Knob("parameter_offload", "where weights live", ("none", "cpu"), "none"),),
    figures=(
        Figure(
            "loads of the weights per micro-batch without recomputation: forward and backward",
            2.0,
            1e-6,
            "Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857), section 4.1",
            _fetches,
        ),
    ),
    valid=valid,
    apply=apply,
)
