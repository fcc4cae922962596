"""Where every second goes: a priced ledger's time, item by item, overlap included.

Within a window the main track's items keep their full time; what the window takes beyond it is the exposed part of the
other tracks, shared among their items in proportion to their length. So exposed seconds add up to the engine's totals.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from planner.costs.overlap import pipelined_s
from planner.engine import PHASES, Pricer
from planner.ledger import AttentionCore, Collective, Item, Kernel, Ledger, Resident, Stream, Transfer

__all__ = ["Share", "attribute", "category"]


@dataclass(frozen=True, slots=True)
class Share:
    """One item's seconds per block instance: alone (``price_s``), and what is left of them in the step (``exposed_s``)."""

    item: Item | None
    block: str
    phase: str
    price_s: float
    exposed_s: float


def attribute(ledger: Ledger, pricer: Pricer) -> list[Share]:
    """Shares of all items of a one-row ledger but its residents; ``item`` None is host dispatch that outlasts the device."""
    phases: dict[tuple[str, str], list[tuple[Item, float]]] = defaultdict(list)
    for item, price in zip(ledger.items, pricer.prices(ledger.items, ledger.axes), strict=True):
        if not isinstance(item, Resident):
            phases[item.block, item.phase].append((item, float(np.ravel(price)[0])))
    shares: list[Share] = []
    for (block, phase), priced in phases.items():
        if phase not in PHASES:  # once per step: the caller knows what hides it
            shares += [Share(item, block, phase, price, price) for item, price in priced]
            continue
        factors, total_s = _factors(priced, ledger, pricer.stack.overlap_slowdown.value)
        shares += [
            Share(i, block, phase, price, price * f) for (i, price), f in zip(priced, factors, strict=True)
        ]
        dispatch_s = sum(i.launches for i, _ in priced if isinstance(i, Kernel)) * float(
            pricer.device.dispatch_s
        )
        if dispatch_s > total_s:
            shares.append(Share(None, block, phase, dispatch_s, dispatch_s - total_s))
    return shares


def category(share: Share) -> str:
    """What a share is spent on, in a user's words."""
    item = share.item
    if item is None:
        return "host_dispatch"
    if isinstance(item, Transfer):
        return "offload"
    if isinstance(item, Collective):
        if "data_parallel" in item.tags:
            return "data_parallel"
        group = item.group.name.partition(".")[0]
        return {
            "tp": "tensor_parallel",
            "cp": "context_parallel",
            "pp": "pipeline_hops",
            "ends": "tied_embedding",
        }.get(group, "expert_parallel")
    if share.phase == "step":
        return "optimizer"
    if share.phase == "recompute":
        return "recompute"
    if isinstance(item, AttentionCore) or "core_attn" in item.tags:
        return "attention"
    return "memory_bound" if isinstance(item, Stream) else "matmul"


def _factors(priced: list[tuple[Item, float]], ledger: Ledger, slowdown: float) -> tuple[list[float], float]:
    """Exposed fraction of each item of one block and phase, and their total."""
    tracks: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item, price in priced:
        tracks[item.window][item.track] += price
    exposed: dict[tuple[str, str], float] = {}
    serial = tracks[""]
    for window, inside in tracks.items():
        if window:
            chunks = float(np.ravel(ledger.chunks.get(window, np.inf))[0])
            total_s = float(pipelined_s([*inside.values()], chunks, slowdown))
            exposed.update(_beyond_main(window, inside, total_s))
            serial["main"] += total_s
    total_s = float(pipelined_s([*serial.values()], np.inf, slowdown))
    exposed.update(_beyond_main("", serial, total_s))
    return [exposed[item.window, item.track] for item, _ in priced], total_s


def _beyond_main(window: str, tracks: dict[str, float], total_s: float) -> dict[tuple[str, str], float]:
    """Main keeps its time; the other tracks share what the window takes beyond it."""
    others = sum(seconds for track, seconds in tracks.items() if track != "main")
    rest = (total_s - tracks.get("main", 0.0)) / others if others else 0.0
    return {(window, track): 1.0 if track == "main" else rest for track in tracks}
