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

from collections.abc import Callable
from dataclasses import replace

from planner.ledger import Ledger, Resident, Transfer
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.swap import Trip, host, swap

_FETCHES = (Trip("fetch", "forward"), Trip("fetch", "backward"))
_STORE = Trip("store", "step", track="main")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps weights on the host, where an update on the device has to bring them back to."""
    return swap(ledger, trips_of(ledger), "zero_infinity")


def trips_of(ledger: Ledger) -> Callable[[Resident], tuple[Trip, ...]]:
    """Ways of a block's weights: up for forward and backward, and back unless the host updates them."""
    away = [item for item in ledger.of(Resident, pool="optimizer") if item.tier != "device"]
    updated_on_host = {item.block for item in away}

    def trips(item: Resident) -> tuple[Trip, ...]:
        if item.pool != "parameters" or item.lifetime != "always":
            return ()
        return _FETCHES if item.block in updated_on_host else (*_FETCHES, _STORE)

    return trips


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
    knobs=(
        Knob("parameter_offload", "where weights live", ("none", "cpu", "cxl", "nvme", "window"), "none"),
    ),
    figures=(
        Figure(
            "loads of the weights per micro-batch without recomputation: forward and backward",
            2.0,
            1e-6,
            "Rajbhandari et al. 2021 (ZeRO-Infinity, arXiv:2104.07857), section 4.1",
            _fetches,
        ),
    ),
    valid=host,
    apply=apply,
)
