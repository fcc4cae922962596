"""The engine: the one place where a ledger's priced items become totals of blocks.

:func:`tabulate` resolves overlap, window by window, and sums a ledger into a :class:`BlockTable`: what one instance of each
block kind costs and holds, per row. Pipelines and serving pools are composed from such tables and from nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from planner.costs.overlap import pipelined_s
from planner.engine.phases import phase_s, shares_backward
from planner.engine.pricer import Pricer
from planner.engine.shared_links import beside_traffic, exchanges, waits, waits_in_pass
from planner.ledger import (
    Array,
    Collective,
    Index,
    Item,
    Ledger,
    Resident,
)

__all__ = [
    "COMPACT",
    "FIELDS",
    "HELD",
    "ONCE",
    "PACED",
    "PHASES",
    "POOLS",
    "TIMES",
    "TRACKS",
    "BlockTable",
    "tabulate",
]

PHASES = ("forward", "backward", "weight", "recompute")
POOLS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
    "gathered",
    "buffers",
    "kv_cache",
)
TRACKS = ("main", "gradients", "weights")
_AWAY = tuple(f"{tier}_{what}" for tier in ("host", "cxl", "nvme") for what in ("bytes", "saved_bytes"))
FIELDS = (
    *(f"{phase}_s" for phase in PHASES),
    "saved_bytes",
    "recomputed_bytes",
    "weight_input_bytes",
    "block_bytes",
    "step_bytes",
    "apart_bytes",
    "freed_bytes",
    *_AWAY,
    *(f"{pool}_bytes" for pool in POOLS),
    *(f"{track}_step_s" for track in TRACKS),
    *(f"{track}_messages" for track in TRACKS),
    "always_bytes",
)
PACED = tuple(f"{phase}_s" for phase in PHASES)
ONCE = (*(f"{track}_step_s" for track in TRACKS), *(f"{track}_messages" for track in TRACKS[1:]))
HELD = (
    "saved_bytes",
    "recomputed_bytes",
    "weight_input_bytes",
    "block_bytes",
    "step_bytes",
    *_AWAY,
    "always_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "buffers_bytes",
)
TIMES, REST = (*PACED, *ONCE), (*ONCE, *HELD)
COMPACT = (*TIMES, *HELD)
_ROWS = {
    fields: {name: index for index, name in enumerate(fields)}
    for fields in (FIELDS, COMPACT, TIMES, REST, PACED, ONCE, HELD)
}
_ALWAYS = frozenset(f"{pool}_bytes" for pool in POOLS)


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """Totals of one instance of every block kind, per row: ``values`` (fields, kinds, rows), by the names of ``FIELDS``.

    ``<phase>_s``: per micro-batch, overlap resolved. ``saved_bytes``: held per micro-batch in flight. ``recomputed_bytes``:
    the same where the block is not recomputed, a transient where it is. ``weight_input_bytes``: held per micro-batch between
    backward and weight gradient. ``block_bytes``: the transient while the block is at work, ``apart_bytes`` and ``freed_bytes``
    what an allocator keeps of it; ``step_bytes``: that of the update. ``<pool>_bytes``: held throughout, ``always_bytes`` their
    sum. ``<tier>_bytes``: held in a slower tier (host, cxl, nvme), and ``<tier>_saved_bytes`` there per micro-batch.
    ``<track>_step_s``: once per optimizer step; ``main`` is serial, ``gradients`` and ``weights`` may hide behind backward and
    forward work; ``<track>_messages``: into how many messages they are cut.
    """

    kinds: tuple[str, ...]
    values: Array
    fields: tuple[str, ...] = FIELDS

    def __getitem__(self, name: str) -> Array:
        field: Array = self.values[_ROWS[self.fields][name]]
        return field

    def of_fields(self, fields: tuple[str, ...]) -> BlockTable:
        """Some of the fields alone."""
        return BlockTable(self.kinds, self.values[[_ROWS[self.fields][name] for name in fields]], fields)

    def take(self, rows: Index) -> BlockTable:
        """Some of the rows."""
        return BlockTable(self.kinds, self.values.take(rows, axis=2), self.fields)

    @staticmethod
    def compact(kinds: tuple[str, ...], values: Array) -> BlockTable:
        """A table that holds the ``COMPACT`` fields only: what the search prices by."""
        return BlockTable(kinds, values, COMPACT)


def tabulate(
    ledger: Ledger, pricer: Pricer, kinds: tuple[str, ...], rows: int, fields: tuple[str, ...] = FIELDS
) -> BlockTable:
    """Prices a ledger, resolves overlap window by window, and sums it per block kind.

    Ledgers that share items on the same axes share the sums of whatever did not change between them. Items that no field is
    about are passed over.
    """
    wanted = {"resident": HELD[0] in fields, "step": ONCE[0] in fields}
    paced = PACED[0] in fields
    passes = paced or (wanted["step"] and any(map(exchanges, ledger.items)))
    parts: dict[tuple[str, str], list[Item]] = {}
    for item in ledger.items:
        part = "resident" if isinstance(item, Resident) else item.phase
        if wanted.get(part, passes):
            parts.setdefault((item.block, part), []).append(item)
    known = ledger.axes.sums
    beside = {
        (block, part): beside_traffic(parts, block) if part == "step" else shares_backward(parts, block, part)
        for block, part in parts
        if wanted.get(part, paced)
    }
    keys = {
        where: (where[1], *map(id, parts[where]), *(id(item) for other in others for item in other))
        for where, others in beside.items()
    }
    new = [where for where, key in keys.items() if key not in known]
    priced = [item for where in new if where[1] != "resident" for item in parts[where]]
    prices = iter(pricer.prices(priced, ledger.axes))  # all at once: a call costs more than most items
    for where in new:
        items, part, others = parts[where], where[1], beside[where]
        if part == "resident":
            totals, sizes = _residents(items, ledger), "|".join(item.size for item in items)  # type: ignore[attr-defined]
        else:
            own = list(islice(prices, len(items)))
            totals = (
                _step(items, own, others, ledger, pricer)
                if part == "step"
                else _phase(part, items, own, others, ledger, pricer)
            )
            sizes = "|".join(pricer.key(item)[0] for item in chain(items, *others))
        known[keys[where]] = (sizes, (totals, items, others))  # the items keep their ids alive
    table = BlockTable(kinds, np.zeros((len(fields), len(kinds), rows)), fields)
    places = _ROWS[fields]
    position = {kind: index for index, kind in enumerate(kinds)}
    for (block, _), key in keys.items():
        for name, total in known[key][1][0].items():
            if name in places:
                table.values[places[name], position[block]] = total
            if name in _ALWAYS and "always_bytes" in places:
                table["always_bytes"][position[block]] += total
    return table


def _phase(
    phase: str, items: list[Item], prices: list[Array], beside: list[list[Item]], ledger: Ledger, pricer: Pricer
) -> dict[str, Array]:  # fmt: skip
    """Seconds of one phase of one block, and the items of other phases that it is priced with."""
    own, others, sums = pricer.lanes(items, ledger, prices), [], ledger.axes.sums
    for each in beside:  # once for all phases that are priced with them
        if (key := ("lanes", *map(id, each))) not in sums:
            sizes = "|".join(pricer.key(item)[0] for item in each)
            sums[key] = (sizes, (pricer.lanes(each, ledger), each))
        others.append(sums[key][1][0])
    seconds = phase_s(phase, own, others, pricer.stack)
    if any(map(exchanges, chain(items, *beside))):
        passes = [list(zip(each, pricer.prices(each, ledger.axes), strict=True)) for each in (items, *beside)]
        seconds = seconds + sum(s for _, s in waits_in_pass(passes, pricer.outermost, ledger.axes))
    return {f"{phase}_s": seconds}


def _step(
    items: list[Item], prices: list[Array], beside: list[list[Item]], ledger: Ledger, pricer: Pricer
) -> dict[str, Array]:
    """Seconds and messages per track of what happens once per optimizer step, and waits for links that its traffic shares.

    A window of the step is named after the track that it lies on, and is one message of it.
    """
    totals: dict[str, Any] = defaultdict(float)
    if beside:
        passes = [list(zip(each, pricer.prices(each, ledger.axes), strict=True)) for each in beside]
        step = list(zip(items, prices, strict=True))
        totals["main_step_s"] += sum(s for _, s in waits(step, passes, pricer.outermost, ledger.axes))
    windows: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    for item, price in zip(items, prices, strict=True):
        if item.window:
            windows[item.window][item.track] = windows[item.window][item.track] + price
            continue
        totals[f"{item.track}_step_s"] = totals[f"{item.track}_step_s"] + price
        if isinstance(item, Collective):
            sent = ledger.axes[item.messages] * (price > 0)  # a group of one sends nothing
            totals[f"{item.track}_messages"] = totals[f"{item.track}_messages"] + sent
    for window, tracks in windows.items():
        inside = pipelined_s(list(tracks.values()), np.inf, pricer.stack.overlap_slowdown.value)
        totals[f"{window}_step_s"] = totals[f"{window}_step_s"] + inside
        totals[f"{window}_messages"] = totals[f"{window}_messages"] + (inside > 0)
    return totals


def _residents(items: list[Item], ledger: Ledger) -> dict[str, Array]:
    """Bytes per lifetime, and per pool for what is held throughout."""
    totals: dict[str, Any] = defaultdict(float)
    for item in items:
        assert isinstance(item, Resident)
        if item.tier != "device":
            name = f"{item.tier}_bytes" if item.lifetime == "always" else f"{item.tier}_saved_bytes"
        else:
            part = {"always": item.pool, "micro_batch": "saved"}.get(item.lifetime, item.lifetime)
            name = f"{part}_bytes"
        totals[name] = totals[name] + ledger.axes[item.size] * item.bytes_per_element
    return totals
