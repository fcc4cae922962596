"""The engine: the one place where items become seconds, and blocks become totals.

:class:`Pricer` prices the items of a ledger on a cluster, each expression once per set of axes (items that passes share or
copy are priced once). :func:`tabulate` then resolves overlap, window by window, and sums a ledger into a
:class:`BlockTable`: what one instance of each block kind costs and holds, per row. Pipelines and serving pools are
composed from such tables and from nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any

import numpy as np

from planner.costs.arrays import Real
from planner.costs.collectives import (
    CUSTOM_ALL_REDUCE,
    CUSTOM_ALL_REDUCE_BYTES,
    Level,
    MessageCost,
    Transport,
    collective_costs,
    fastest_s,
    group_members,
)
from planner.costs.expert_exchange import exchange_traffic
from planner.costs.overlap import pipelined_s
from planner.costs.precision import dtype_bytes
from planner.kernel_prices import KernelPrices, beside_nothing, exchange_s, slowdown_constant
from planner.ledger import (
    Array,
    AttentionCore,
    Axes,
    Collective,
    Group,
    Index,
    Item,
    Ledger,
    Matmul,
    Resident,
    Stream,
    Transfer,
    at,
)
from planner.phases import Lanes, lanes, phase_s, shares_backward
from planner.shared_links import beside_traffic, exchanges, waits, waits_in_pass
from planner.specs.cluster import Cluster, Tier
from planner.specs.exchange_library import exchange_kernel
from planner.specs.stack import Stack

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
    "Pricer",
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


class Pricer:
    """Prices items on one cluster with one software stack; results are remembered on the ledger's axes."""

    def __init__(self, cluster: Cluster, stack: Stack) -> None:
        self.cluster = cluster
        self.device = cluster.device
        self.stack = stack.on_generation(self.device.generation)
        self._kernels = KernelPrices(self.device, self.stack)
        self._transports = [_transport(tier) for tier in cluster.tiers]
        self._levels: dict[int, tuple[Group, list[Level]]] = {}
        self._costs: dict[tuple[int, str, str], tuple[Group, tuple[MessageCost, ...]]] = {}
        self._keys: dict[int, tuple[Any, Item]] = {}

    def prices(self, items: Sequence[Item], axes: Axes) -> list[Array]:
        """Seconds of every item, in order; zero for residents. Arrays broadcast over the axes' rows."""
        known = axes.prices
        missing: dict[Any, Item] = {}
        keys = [self.key(item) for item in items]
        for key, item in zip(keys, items, strict=True):
            if key is not None and key not in known:
                missing.setdefault(key, item)
        if missing:
            by_kind: tuple[tuple[type[Item], Any], ...] = (
                (Matmul, self._kernels.matmuls),
                (Stream, self._kernels.streams),
                (AttentionCore, self._kernels.attention),
                (Collective, self._collectives),
                (Transfer, self._transfers),
            )
            for kind, price in by_kind:
                batch = {key: item for key, item in missing.items() if isinstance(item, kind)}
                if batch:
                    seconds = zip(batch.values(), price(list(batch.values()), axes), strict=True)
                    slowed = (
                        alone if (x := self._slowdown(item)) == 1.0 else alone * x for item, alone in seconds
                    )
                    known.update(zip(batch, slowed, strict=True))
        return [_ZERO if key is None else known[key] for key in keys]

    def lanes(self, items: Sequence[Item], ledger: Ledger, prices: Sequence[Array] | None = None) -> Lanes:
        """The streams of one phase of one block; ``prices``, where the items are priced already."""
        axes, innermost = ledger.axes, self.cluster.tiers[0].effective_bytes_per_s

        def contended_s(item: Item, price: Array) -> Array:
            """What an item's bytes would take on the innermost link: beyond that it waits, and slows nothing."""
            if isinstance(item, Collective):
                sends = 2.0 if item.kind == "all_reduce" else 1.0
                each = sends * dtype_bytes(item.dtype) * self._slowdown(item)
            elif isinstance(item, Transfer):
                each = item.bytes_per_element
            else:
                return price
            return np.minimum(price, axes[item.size] * (each / innermost))

        slowdown = self.stack.overlap_slowdown.value
        return lanes(
            items, self.prices(items, axes) if prices is None else prices, ledger, contended_s, slowdown
        )

    def key(self, item: Item) -> Any:
        """What the item's price depends on besides the axes, remembered per item (whose id stays its own while held)."""
        known = self._keys.get(id(item))
        if known is None:
            known = self._keys[id(item)] = (_key(item), item)
        return known[0]

    def outermost(self, group: Group) -> Array:
        """The number of the outermost tier that a group spans, on every row."""
        members = np.stack(np.broadcast_arrays(*(level.members for level in self.levels(group))))
        return np.asarray(np.count_nonzero(members < members[-1], axis=0))

    def levels(self, group: Group) -> list[Level]:
        """The group's path through the cluster's tiers, innermost first."""
        found = self._levels.get(id(group))
        if found is None:
            size, stride = np.broadcast_arrays(group.size, group.stride)
            ranks = float(self.cluster.devices)
            levels = [
                Level(
                    np.asarray(group_members(size, stride, tier.size, ranks), dtype=np.float64),
                    tier.effective_bytes_per_s,
                    tier.latency_s,
                    transport,
                )
                for tier, transport in zip(self.cluster.tiers, self._transports, strict=True)
            ]
            found = self._levels[id(group)] = (group, levels)
        return found[1]

    def _slowdown(self, item: Item) -> float:
        """What the stack makes of an item's seconds alone."""
        constant = slowdown_constant(item, self.stack)
        return 1.0 if constant is None else float(getattr(self.stack, constant))

    # -- one method per kind of item; each prices a list of items over all rows ------------------------------------

    def _collectives(self, items: list[Collective], axes: Axes) -> Iterable[Real]:
        for item in items:
            n_bytes = axes[item.size] * (dtype_bytes(item.dtype) / item.share)
            if item.kernel:
                levels, once = self.levels(item.group), n_bytes / item.choices
                traffic = exchange_traffic(once, item.choices, levels, neighbours_of=item.neighbours_of)
                seconds = exchange_s(exchange_kernel(item.kernel), *traffic, levels, item.units)
                yield seconds * np.greater(item.group.size, 1) * item.share
                continue
            # Cut into messages: the bytes once, the latency of every message.
            messages = 1.0 if item.messages == "1" else np.maximum(axes[item.messages], 1.0)
            each = n_bytes / messages
            library = self._costs_of(item.group, item.kind)
            seconds = fastest_s(each, library)
            if item.custom:
                own = (c for name in CUSTOM_ALL_REDUCE for c in self._costs_of(item.group, item.kind, name))
                seconds = np.where(
                    each <= CUSTOM_ALL_REDUCE_BYTES, fastest_s(each, (*own, *library)), seconds
                )
            yield seconds * messages * item.share

    def _costs_of(self, group: Group, kind: str, algorithm: str = "auto") -> tuple[MessageCost, ...]:
        where = (id(group), kind, algorithm)
        if where not in self._costs:
            if group.whole is None:
                costs = collective_costs(kind, self.levels(group), algorithm)  # type: ignore[arg-type]
            else:
                whole, rows = group.whole
                costs = tuple(_cost_at(cost, rows) for cost in self._costs_of(whole, kind, algorithm))
            self._costs[where] = (group, costs)  # which keeps the group's id its own
        return self._costs[where][1]

    def _transfers(self, items: list[Transfer], axes: Axes) -> Iterable[Array]:
        rate = {
            "host_link": self.cluster.host_link_bytes_per_s,
            "host_memory": self.cluster.host_memory_bytes_per_s,
            "cxl": self.cluster.cxl_bytes_per_s,
            "nvme": self.cluster.nvme_bytes_per_s,
        }
        for item in items:
            yield axes[item.size] * item.bytes_per_element / rate[item.tier]


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


def _transport(tier: Tier) -> Transport | None:
    """How the communication library drives a tier's link, in the terms of the cost formulas."""
    constants = tier.transport
    if constants is None:
        return None
    known = ((field.name, getattr(constants, field.name)) for field in fields(constants))
    scale_out = tier.topology == "fabric"
    return Transport(**{n: float(v) for n, v in known if v is not None}, scale_out=scale_out)


def _cost_at(cost: MessageCost, rows: Index) -> MessageCost:
    """What an algorithm costs on some of the rows."""
    return MessageCost(*(None if part is None else at(np.asarray(part), rows) for part in cost))  # type: ignore[arg-type]


def _key(item: Item) -> Any:
    """What a price depends on: all its expressions in one text, then the rest; None for residents."""
    if isinstance(item, Matmul):
        sizes = f"{item.m}|{item.n}|{item.k}|{item.groups}"
        if isinstance(item.out_bytes, str):
            sizes = f"{sizes}|{item.out_bytes}"
        return (sizes, item.grouped, item.single, item.dtype, item.out_bytes, item.launches, item.format)
    if isinstance(item, Stream):
        sizes = f"{item.size}|{item.calls}" if item.calls is not None else item.size
        flop = (item.flop_per_element, item.product_flop_per_element)
        return (sizes, item.bytes_per_element, item.launches, *flop)
    if isinstance(item, Collective):
        spread = (item.neighbours_of, item.units, item.share)
        how = (item.custom, item.kernel, item.choices, beside_nothing(item), *spread)
        return (f"{item.size}|{item.messages}", item.kind, item.group.key, item.dtype, *how)
    if isinstance(item, AttentionCore):
        sizes = "|".join(
            (item.batch, item.heads, item.kv_heads, item.q, item.kv, item.qk_dim, item.v_dim, item.visible)
        )
        return (sizes, item.passes, item.dtype, item.stored, item.latent, item.decode)
    if isinstance(item, Transfer):
        return (item.size, item.bytes_per_element, item.tier)
    return None


_ZERO = np.zeros(1)
