"""One step of a plan as slices of time: what every rank of the pipeline computes, sends and holds, and when.

The schedule engine's own times: an operation takes what its blocks take with overlap resolved. Inside an operation only
totals are known, so that its communication and its transfers are drawn as one slice per kind, from its start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.ledger import Array, Collective, Transfer
from planner.pipeline.composer import phase_seconds, recomputed_fraction, tail_traffic
from planner.pipeline.step_time import stage_seconds
from planner.plans.assemble import Assembly
from planner.plans.attribution import category
from planner.schedule.memory import in_flight
from planner.schedule.order import Op, Order, make_order
from planner.schedule.program import messages
from planner.schedule.times import operation_times

__all__ = ["STREAMS", "Arrow", "Slice", "StepTrace", "step_trace"]

STREAMS = ("compute", "communication", "transfers")
_NAMES = {Op.F: "forward", Op.B: "backward", Op.W: "weight gradient"}


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that takes time on a stream of a device."""

    device: int
    stream: str
    kind: str
    name: str
    start_s: float
    duration_s: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrow:
    """A message: it leaves a device and arrives at another one."""

    what: str
    sender: int
    receiver: int
    leaves_s: float
    arrives_s: float


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A step.

    Attributes:
        assembly: the plan that it is a step of.
        devices: a name for every device of the pipeline.
        slices, arrows: what happens.
        held: per device, (time, bytes of activations) wherever they change; empty where the lists do not tell.
        step_s: the plan's step time. Where no barrier ends a step, the next one begins before this one has ended.
        end_s: end of the last slice.
    """

    assembly: Assembly
    devices: Sequence[str]
    slices: Sequence[Slice]
    arrows: Sequence[Arrow]
    held: Sequence[Sequence[tuple[float, float]]]
    step_s: float
    end_s: float


def step_trace(assembly: Assembly) -> StepTrace:
    """The trace of an assembled plan's step."""
    layout = assembly.layout
    recomputed = recomputed_fraction(layout.device_counts, assembly.recompute_layers)
    stages_s, hop_s, tail_s = stage_seconds(assembly.table, layout, assembly.order, recomputed)
    seconds = np.zeros((3, len(layout.counts)))
    for op, stage_s in enumerate(stages_s):
        seconds[op] = stage_s[:, 0]
    order = make_order(assembly.order, layout.pp, assembly.micro_batches, layout.virtual_stages)
    start_s, end_s = operation_times(order, seconds, float(hop_s[0]))
    again = recomputed[order.device_of_stage, 0]
    work = _Work(assembly, again)
    slices = [*_operations(order, start_s, end_s, work), *_tails(assembly, end_s[:, -1], recomputed)]
    return StepTrace(
        assembly,
        _device_names(assembly),
        slices,
        list(_arrows(order, start_s, end_s, float(hop_s[0]))),
        _held(assembly, order, start_s, end_s, again),
        assembly.plan.estimate.step_time_s,
        float((end_s[:, -1] + tail_s[:, 0]).max()),
    )


def _device_names(assembly: Assembly) -> list[str]:
    layout = assembly.layout
    layers = layout.device_counts[:, :-3].sum(axis=1)
    return [f"rank {device} · {int(n)} layers" for device, n in enumerate(layers)]


class _Work:
    """What an operation of a stage consists of: seconds by stream and kind. ``recomputed``: share of each stage's layers."""

    def __init__(self, assembly: Assembly, recomputed: Array) -> None:
        table, counts = assembly.table, assembly.layout.counts
        splits = assembly.order.splits_backward
        phases: dict[Op, tuple[str, ...]] = {
            Op.F: ("forward",),
            Op.B: ("backward", "recompute", *(() if splits else ("weight",))),
            Op.W: ("weight",),
        }
        self._beside: dict[tuple[Op, str, str], Array] = defaultdict(lambda: np.zeros(len(counts)))
        for op, parts in phases.items():
            for share in (spent.share for spent in assembly.spends):
                if share.phase in parts and isinstance(share.item, Collective | Transfer):
                    stream = "communication" if isinstance(share.item, Collective) else "transfers"
                    times = counts[:, table.kinds.index(share.block)]
                    if share.phase == "recompute":
                        times = times * recomputed
                    self._beside[op, stream, category(share)] += times * share.price_s
        self._again = recomputed * (counts @ phase_seconds(table)[2][:, 0])

    def beside(self, op: Op, stage: int) -> Iterator[tuple[str, str, float]]:
        """(stream, kind, seconds) of communication and transfers in an operation."""
        for (of, stream, kind), seconds in self._beside.items():
            if of == op and seconds[stage] > 0.0:
                yield stream, kind, float(seconds[stage])

    def recompute_s(self, stage: int) -> float:
        """Seconds of a backward that repeat the forward."""
        return float(self._again[stage])


def _operations(order: Order, start_s: Array, end_s: Array, work: _Work) -> Iterator[Slice]:
    """Every operation, and what runs beside its kernels."""
    known = {
        (op, stage): (list(work.beside(op, stage)), work.recompute_s(stage) if op == Op.B else 0.0)
        for op in Op
        for stage in range(order.n_virtual)
    }
    for device, (kinds, stages, numbers) in enumerate(
        zip(order.kind, order.stage, order.micro_batch, strict=True)
    ):
        for i, (kind, stage, k) in enumerate(
            zip(kinds.tolist(), stages.tolist(), numbers.tolist(), strict=True)
        ):
            op, begin_s, long_s = (
                Op(kind),
                float(start_s[device, i]),
                float(end_s[device, i] - start_s[device, i]),
            )
            beside, again_s = known[op, stage]
            details: dict[str, Any] = {"micro_batch": k, "stage": stage, "chunk": stage // order.shape.p}
            if again_s:
                details["recompute_s"] = again_s
            yield Slice(device, "compute", _NAMES[op], f"{op.name}{k}", begin_s, long_s, details)
            for stream in STREAMS[1:]:
                mine = [(what, seconds) for of, what, seconds in beside if of == stream]
                shrink = min(1.0, long_s / max(sum(seconds for _, seconds in mine), 1e-30))
                at_s = begin_s
                for what, seconds in mine:
                    yield Slice(
                        device,
                        stream,
                        what,
                        what.replace("_", " "),
                        at_s,
                        seconds * shrink,
                        {"alone_s": seconds},
                    )
                    at_s += seconds * shrink


def _tails(assembly: Assembly, last_s: Array, recomputed: Array) -> Iterator[Slice]:
    """What follows a device's last operation: gradient traffic (which began beside it), the update, weights of the next step."""
    table, counts = assembly.table, assembly.layout.device_counts
    forward, backward, again = phase_seconds(table)
    backward_s = counts @ backward + recomputed * (counts @ again)
    traffic = tail_traffic(table, counts, counts @ forward, backward_s)
    update_s = (counts @ table["main_step_s"])[:, 0]
    for device, end in enumerate(last_s.tolist()):
        (gradients_s, late_s), (_, gather_s) = (
            tuple(float(x[device, 0]) for x in traffic[track]) for track in ("gradients", "weights")
        )
        if gradients_s:
            begin_s = end + late_s - gradients_s
            yield Slice(
                device, "communication", "gradients", "gradients", begin_s, gradients_s, {"exposed_s": late_s}
            )
        if update_s[device]:
            yield Slice(device, "compute", "update", "update", end + late_s, float(update_s[device]))
        if gather_s:
            begin_s = end + late_s + float(update_s[device])
            yield Slice(
                device, "communication", "weights", "weights", begin_s, gather_s, {"exposed_s": gather_s}
            )


def _arrows(order: Order, start_s: Array, end_s: Array, hop_s: float) -> Iterator[Arrow]:
    """Messages between devices."""
    sender, sent, _ = messages(order)
    for device, i in zip(*np.nonzero(sent >= 0), strict=True):
        leaves_s = float(end_s[sender[device, i], sent[device, i]])
        what = "activation" if order.kind[device, i] == Op.F else "gradient"
        yield Arrow(
            what,
            int(sender[device, i]),
            int(device),
            leaves_s,
            max(leaves_s + hop_s, float(start_s[device, i])),
        )


def _held(
    assembly: Assembly, order: Order, start_s: Array, end_s: Array, recomputed: Array
) -> list[list[tuple[float, float]]]:
    """Activations that each device holds over time."""
    table, layout, generator = assembly.table, assembly.layout, assembly.order
    p, m = order.shape.p, order.shape.m
    if generator.in_flight is not None and np.any(
        generator.in_flight(p, m, np.arange(p)) != in_flight(order)
    ):
        return []  # the schedule holds them elsewhere
    saved = layout.counts @ table["saved_bytes"][:, 0]
    saved = saved + (1.0 - recomputed) * (layout.counts @ table["recomputed_bytes"][:, 0])
    waiting = layout.counts @ table["weight_input_bytes"][:, 0] * generator.splits_backward
    curves = []
    for device in range(p):
        kind, stage = order.kind[device], order.stage[device]
        when = np.where(kind == Op.F, start_s[device], end_s[device])
        after_b = waiting - saved
        change = np.select([kind == Op.F, kind == Op.B], [saved[stage], after_b[stage]], -waiting[stage])
        rank = np.argsort(when, kind="stable")
        curves.append(list(zip(when[rank].tolist(), np.cumsum(change[rank]).tolist(), strict=True)))
    return curves if any(held for curve in curves for _, held in curve) else []
