"""Where every second goes: a priced ledger's time, item by item, overlap included.

Within a window the main track's items keep their full time; what the window takes beyond it is the exposed part of the
other tracks, shared among their items in proportion to their length. So exposed seconds add up to the engine's totals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from planner.costs.overlap import pipelined_s, uniform_bucket_exposure_s
from planner.engine.block_table import PHASES, BlockTable
from planner.engine.phases import Lanes, loose, phase_s, shares_backward, together_s
from planner.engine.pricer import Pricer
from planner.engine.shared_links import beside_traffic, waits, waits_in_pass
from planner.ledger import Array, AttentionCore, Collective, Item, Ledger, Resident, Stream, Transfer
from planner.pipeline.composer import phase_seconds, recomputed_fraction
from planner.pipeline.layout import BOUNDARY, Layout

__all__ = ["Share", "Spend", "attribute", "category", "spend"]


class Share(NamedTuple):
    """One item's seconds per block instance: alone (``price_s``), and what is left of them in the step (``exposed_s``)."""

    item: Item | None
    block: str
    phase: str
    price_s: float
    exposed_s: float


class Spend(NamedTuple):
    """Seconds of one item in one optimizer step on one device: ``alone_s`` if nothing hid it, ``seconds`` as it is."""

    share: Share
    times: float
    alone_s: float
    seconds: float

    @property
    def category(self) -> str:
        """What the seconds are spent on."""
        return category(self.share)


def attribute(ledger: Ledger, pricer: Pricer) -> list[Share]:
    """Shares of all items of a one-row ledger but its residents; ``item`` None is host dispatch that outlasts the device, or that
    it waits for."""
    phases: dict[tuple[str, str], list[tuple[Item, float]]] = defaultdict(list)
    for item, price in zip(ledger.items, pricer.prices(ledger.items, ledger.axes), strict=True):
        if not isinstance(item, Resident):
            phases[item.block, item.phase].append((item, _first(price)))
    shares: list[Share] = []
    items = {key: [item for item, _ in some] for key, some in phases.items()}
    streams = {
        key: pricer.lanes(items[key], ledger, [np.atleast_1d(price) for _, price in some])
        for key, some in phases.items()
        if key[1] in PHASES
    }
    for (block, phase), priced in phases.items():
        if phase not in PHASES:  # once per step: the caller knows what hides it
            inside = _inside(priced, pricer.stack.overlap_slowdown.value)
            shares += [
                Share(item, block, phase, price, price * inside[item.window]) for item, price in priced
            ]
            alone = [(item, np.asarray(price)) for item, price in priced]
            passes = beside_traffic({key: [item for item, _ in some] for key, some in phases.items()}, block)
            beside = [list(zip(each, pricer.prices(each, ledger.axes), strict=True)) for each in passes]
            found = waits(alone, beside, pricer.outermost, ledger.axes)
            shares += [
                Share(item.but(track="main", window=""), block, phase, 0.0, _first(s)) for item, s in found
            ]
            continue
        own = streams[block, phase]
        shares += _beside_main(priced, own, ledger, pricer)
        with_it = shares_backward(items, block, phase)
        together = [priced, *(phases[block, which[0].phase] for which in with_it)]
        arrays = [[(item, np.asarray(price)) for item, price in some] for some in together]
        waiting = waits_in_pass(arrays, pricer.outermost, ledger.axes)
        shares += [Share(item, block, phase, 0.0, _first(s)) for item, s in waiting]
        others = [streams[block, which[0].phase] for which in with_it]
        total_s, alone_s = (
            _first(phase_s(phase, own._replace(launches=0.0, waits=0.0), beside, pricer.stack))
            for beside in (others, [])
        )
        # What the other phases of the backward hide of the traffic beside it counts below zero.
        traffic = [(i, price) for i, price in phases[block, "backward"] if loose([i])] if others else []
        whole_s = sum(price for _, price in traffic)
        shares += [
            Share(i, block, phase, 0.0, (total_s - alone_s) * price / whole_s)
            for i, price in traffic
            if whole_s
        ]
        paced_s = _first(phase_s(phase, own._replace(waits=0.0), others, pricer.stack))
        if paced_s > total_s:
            dispatch_s = _first(own.launches) * float(pricer.stack.dispatch_s)
            shares.append(Share(None, block, phase, dispatch_s, paced_s - total_s))
        if waited := _first(own.waits):
            waited_s = waited * float(pricer.stack.waited_dispatches) * float(pricer.stack.dispatch_s)
            shares.append(Share(None, block, phase, waited_s, waited_s))
    return shares


def spend(
    shares: list[Share], table: BlockTable, layout: Layout, device: int, micro_batches: float, recompute_layers: int | None
) -> list[Spend]:  # fmt: skip
    """What one device spends its step on, item by item; what is left of the step is the pipeline's bubble.

    ``micro_batches`` are those that pass each of its stages.

    Hops are left out: they delay the receiver and are part of its bubble. What gradient and weight traffic takes beyond
    the work that hides it is shared among its items in proportion to their length.
    """
    fraction = float(recomputed_fraction(layout.device_counts, recompute_layers)[device, 0])
    counts = layout.device_counts[device]
    exposed = _exposed_tracks(table, counts, fraction)
    spends: list[Spend] = []
    less_s: dict[tuple[int, str], float] = defaultdict(float)  # what other phases hide of an item's traffic
    for share in shares:
        if share.block == BOUNDARY:
            continue
        times = float(counts[table.kinds.index(share.block)])
        if share.phase == "step":
            track = (share.item.window or share.item.track) if share.item is not None else "main"
            left = exposed.get(track, 1.0)
        else:
            times *= micro_batches * (fraction if share.phase == "recompute" else 1.0)
            left = 1.0
        if share.price_s or share.exposed_s >= 0.0:
            spends.append(Spend(share, times, times * share.price_s, times * share.exposed_s * left))
        else:
            less_s[id(share.item), share.block] += times * share.exposed_s
    for index, one in enumerate(spends):
        if hidden_s := less_s.pop((id(one.share.item), one.share.block), 0.0):
            spends[index] = one._replace(seconds=one.seconds + hidden_s)
    return spends


def _inside(priced: list[tuple[Item, float]], slowdown: float) -> dict[str, float]:
    """What a window of the step takes, relative to the sum of its items."""
    tracks: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item, price in priced:
        tracks[item.window][item.track] += price
    share = {"": 1.0}
    for window, inside in tracks.items():
        whole = sum(inside.values())
        if window:
            share[window] = float(pipelined_s([*inside.values()], np.inf, slowdown)) / whole if whole else 1.0
    return share


def _exposed_tracks(table: BlockTable, counts: Array, recomputed: float) -> dict[str, float]:
    """Fraction of the gradients' and weights' traffic that nothing hides."""
    forward, backward, again = phase_seconds(table)
    exposed = {}
    for track, beside in (("gradients", backward + again * recomputed), ("weights", forward)):
        messages = max(float((counts @ table[f"{track}_messages"])[0]), 1.0)
        whole_s = float((counts @ table[f"{track}_step_s"])[0])
        left_s = float(uniform_bucket_exposure_s(whole_s, float((counts @ beside)[0]), messages))
        exposed[track] = left_s / whole_s if whole_s else 0.0
    return exposed


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
            "change": "resharding",
        }.get(group, "expert_parallel")
    if share.phase == "step":
        return "optimizer"
    if share.phase == "recompute":
        return "recompute"
    if isinstance(item, AttentionCore) or "core_attn" in item.tags:
        return "attention"
    return "memory_bound" if isinstance(item, Stream) else "matmul"


def _beside_main(
    priced: list[tuple[Item, float]], own: Lanes, ledger: Ledger, pricer: Pricer
) -> Iterator[Share]:
    """Shares of one block's phase by itself: main keeps its time, other tracks share what their window takes beyond it."""
    rest = {"": _first(together_s(own.main, own.others, pricer.stack.overlap_slowdown.value) - own.main)}
    others: dict[str, float] = defaultdict(float)
    for item, price in priced:
        others[item.window] += price if item.track != "main" else 0.0
    for window in others.keys() - {""}:
        inside = [(item, price) for item, price in priced if item.window == window]
        whole_s = _first(pricer.lanes([item for item, _ in inside], ledger).main)
        rest[window] = whole_s - sum(price for item, price in inside if item.track == "main")
    for item, price in priced:
        part = 1.0 if item.track == "main" else rest[item.window] / (others[item.window] or 1.0)
        yield Share(item, item.block, item.phase, price, price * part)


def _first(value: Array | float) -> float:
    return float(np.ravel(value)[0])
