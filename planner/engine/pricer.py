"""Seconds of items: every kernel, collective and transfer of a ledger, on one cluster with one software stack.

Each expression is priced once per set of axes: items that passes share or copy are priced once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
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
from planner.costs.precision import dtype_bytes
from planner.engine.kernel_prices import KernelPrices, beside_nothing, exchange_s, slowdown_constant
from planner.engine.phases import Lanes, lanes
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
    Stream,
    Transfer,
    at,
)
from planner.specs.cluster import Cluster, Tier
from planner.specs.exchange_library import exchange_kernel
from planner.specs.stack import Stack

__all__ = ["Pricer"]


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
