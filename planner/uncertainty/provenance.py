"""What a prediction rests on: the kinds of all constants behind it, and the weakest of them.

A constant counts where something in the plan is priced with it: what a plan never does cannot weaken it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from planner.costs.precision import FORMAT_BITS
from planner.engine.kernels import Kernels
from planner.ledger import AttentionCore, Collective, Matmul, Stream, Transfer
from planner.plans.attribution import Spend
from planner.specs.cluster import Cluster
from planner.specs.device import Device, ScaleUp, Sourced
from planner.specs.stack import Stack

__all__ = ["STRENGTH", "provenance", "weakest_text"]

STRENGTH = ("assumed", "fitted", "measured", "datasheet")
"""Kinds of numbers, the weakest first."""

Named = tuple[str, Sourced]
_PEAK = ("framework_bytes", "communicator_bytes", "fragmentation", "gradient_bucket_bytes")
_PEAK_OF_SOME = ("bucket_copies", "copied_bucket_bytes", "update_bytes_per_parameter", "stage_tensors")
_MATMUL = ("matmul_tile", "overlap_loss", "split_s", "memory")
_TILES = ("attention_straggler", "attention_tile", "attention_tile_s", "softmax_flop")
_ATTENTION = (*_TILES, "overlap_loss", "split_s", "memory")


def provenance(cluster: Cluster, stack: Stack, spends: Iterable[Spend]) -> dict[str, Any]:
    """The weakest kind behind the step time and behind the peak, and the constants that are no better than assumed.

    Args:
        cluster: the machines.
        stack: the software.
        spends: what the busiest device does in a step.

    Returns:
        ``step_time_s`` and ``peak``: a kind each; ``assumed``: names of constants, by file.
    """
    device = cluster.device
    stack = stack.on_generation(device.generation)
    time = dict(_time_constants(device, cluster, stack, spends))
    peak: dict[str, Sourced] = {f"stack.{name}": getattr(stack, name) for name in _PEAK}
    peak |= {
        f"stack.{name}": number for name in _PEAK_OF_SOME if (number := getattr(stack, name)) is not None
    }
    assumed = sorted(name for name, number in {**time, **peak}.items() if number.kind == "assumed")
    return {"step_time_s": _weakest(time.values()), "peak": _weakest(peak.values()), "assumed": assumed}


def weakest_text(found: Mapping[str, Any]) -> str:
    """What :func:`provenance` found, in a line: the weakest kinds, and how many constants of which part are assumed.

    >>> weakest_text({"step_time_s": "assumed", "peak": "fitted", "assumed": ["launch_s", "stack.dispatch_s", "stack.x"]})
    'weakest: assumed behind the step time, fitted behind the peak; assumed are 3 constants (launch_s, 2 of stack)'
    """
    parts: dict[str, list[str]] = {}
    for name in found["assumed"]:
        parts.setdefault(name.partition(".")[0], []).append(name)
    told = [names[0] if len(names) == 1 else f"{len(names)} of {part}" for part, names in parts.items()]
    assumed = f"; assumed are {len(found['assumed'])} constants ({', '.join(told)})" if told else ""
    return f"weakest: {found['step_time_s']} behind the step time, {found['peak']} behind the peak{assumed}"


# -- details ---------------------------------------------------------------------------------------------------------


def _weakest(numbers: Iterable[Sourced]) -> str:
    return min((number.kind for number in numbers), key=STRENGTH.index)


def _time_constants(
    device: Device, cluster: Cluster, stack: Stack, spends: Iterable[Spend]
) -> Iterator[Named]:
    """Constants that some item of the step is priced with; some come more than once."""
    yield "memory_bytes_per_s", device.memory_bytes_per_s
    yield "launch_s", device.launch_s
    yield "stack.dispatch_s", stack.dispatch_s
    done = set()
    for spent in spends:
        item = spent.share.item
        if item is None or not spent.alone_s:
            continue
        if spent.seconds < spent.alone_s:
            yield "stack.overlap_slowdown", stack.overlap_slowdown
        priced_alike = isinstance(item, Stream | Collective)
        what = (
            type(item),
            "" if priced_alike else getattr(item, "dtype", ""),
            getattr(item, "grouped", False),
        )
        if what in done:
            continue
        done.add(what)
        if isinstance(item, Matmul):
            yield from _product(device, stack, item)
        elif isinstance(item, AttentionCore):
            yield from _attention(device, stack, item.dtype)
        elif isinstance(item, Stream):
            yield from _of_efficiency(device, ("memory",))
            yield "vector_flop_per_s", device.vector_flop_per_s
            yield "stack.stream_slowdown", stack.stream_slowdown
        elif isinstance(item, Collective):
            yield from _links(device, cluster)
            yield "stack.collective_slowdown", stack.collective_slowdown
        elif isinstance(item, Transfer):
            yield "host_link_bytes_per_s", device.host_link_bytes_per_s


def _product(device: Device, stack: Stack, item: Matmul) -> Iterator[Named]:
    yield from _peak(device, item.dtype)
    yield from _of_efficiency(device, _MATMUL)
    reached, slower = "matmul", stack.product_constant(FORMAT_BITS[item.dtype], grouped=item.grouped)
    width = {"fp8": "_8bit", "int8": "_8bit", "fp4": "_4bit"}.get(_rate_of(device, item.dtype), "")
    if item.grouped and not item.apart:
        yield from _of_efficiency(device, ("grouped_matmul",))
    yield from _of_efficiency(device, (reached + width,))
    if not item.single:
        yield f"stack.{slower}", getattr(stack, slower)


def _attention(device: Device, stack: Stack, dtype: str) -> Iterator[Named]:
    narrow = _rate_of(device, dtype) in ("fp8", "int8", "fp4")
    yield from _peak(device, dtype)
    yield from _of_efficiency(device, _ATTENTION)
    yield from _of_efficiency(device, ("attention_8bit" if narrow else "attention", "attention_backward"))
    yield "stack.attention_slowdown", stack.attention_slowdown


def _rate_of(device: Device, dtype: str) -> str:
    """Dtype of the rate that products of a dtype run at."""
    return Kernels(device).peak_flop_per_s(dtype)[1]


def _peak(device: Device, dtype: str) -> Iterator[Named]:
    name = _rate_of(device, dtype)
    yield f"peak_flop_per_s.{name}", device.peak_flop_per_s.get(name, device.vector_flop_per_s)


def _of_efficiency(device: Device, names: Iterable[str]) -> Iterator[Named]:
    for name in names:
        yield f"efficiency.{name}", getattr(device.efficiency, name)


def _links(device: Device, cluster: Cluster) -> Iterator[Named]:
    """Constants of the links that the cluster's tiers are made of; numbers that a cluster's file states are its author's."""
    tiers = {tier.name for tier in cluster.tiers}
    for name, link in (("scale_up", device.scale_up), ("within_node", device.within_node)):
        if link is not None and link.kind in tiers:
            yield from _link(name, link)
    if tiers & {"nic", "leaf", "spine"}:
        for name in ("nic_bytes_per_s", "nic_latency_s", "nic_efficiency"):
            yield name, getattr(device, name)
        yield from _sourced("nic_transport", device.nic_transport)


def _link(name: str, link: ScaleUp) -> Iterator[Named]:
    yield from _sourced(name, link)
    yield from _sourced(f"{name}.transport", link.transport)


def _sourced(name: str, table: Any) -> Iterator[Named]:
    """The sourced numbers among the fields of a table; nothing where there is none."""
    values: Mapping[str, Any] = (
        {} if table is None else {f.name: getattr(table, f.name) for f in fields(table)}
    )
    for field, value in values.items():
        if isinstance(value, Sourced):
            yield f"{name}.{field}", value
