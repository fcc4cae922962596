"""A step as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

One process per rank of the pipeline, one thread per stream, arrows for messages, a counter for activations. Source: Trace Event
Format, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.report.step_trace import STREAMS, StepTrace

__all__ = ["chrome_trace"]

_MICROSECONDS = 1e6


def chrome_trace(trace: StepTrace) -> dict[str, Any]:
    """The trace as a JSON object."""
    plan = trace.assembly.plan
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "plan": plan.id,
            "model": plan.model,
            "cluster": plan.cluster,
            "schedule": str(plan.knobs["schedule"]),
            "micro_batches": trace.assembly.micro_batches,
            "step_time_s": trace.step_s,
        },
        "traceEvents": [*_names(trace), *_slices(trace), *_arrows(trace), *_counters(trace)],
    }


def _names(trace: StepTrace) -> Iterator[dict[str, Any]]:
    used = {(s.device, s.stream) for s in trace.slices}
    for device, name in enumerate(trace.devices):
        yield {"ph": "M", "pid": device, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": device, "name": "process_sort_index", "args": {"sort_index": device}}
        for thread, stream in enumerate(STREAMS):
            if (device, stream) in used:
                yield {
                    "ph": "M",
                    "pid": device,
                    "tid": thread,
                    "name": "thread_name",
                    "args": {"name": stream},
                }


def _slices(trace: StepTrace) -> Iterator[dict[str, Any]]:
    for s in trace.slices:
        yield {
            "ph": "X", "pid": s.device, "tid": STREAMS.index(s.stream), "name": s.name, "cat": s.kind,
            "ts": s.start_s * _MICROSECONDS, "dur": s.duration_s * _MICROSECONDS, "args": dict(s.details),
        }  # fmt: skip


def _arrows(trace: StepTrace) -> Iterator[dict[str, Any]]:
    for number, arrow in enumerate(trace.arrows):
        common = {"cat": "message", "name": arrow.what, "id": number, "tid": 0}
        yield {"ph": "s", "pid": arrow.sender, "ts": arrow.leaves_s * _MICROSECONDS, **common}
        yield {"ph": "f", "bp": "e", "pid": arrow.receiver, "ts": arrow.arrives_s * _MICROSECONDS, **common}


def _counters(trace: StepTrace) -> Iterator[dict[str, Any]]:
    for device, curve in enumerate(trace.held):
        for when_s, held in curve:
            args = {"GiB": held / 2**30}
            yield {
                "ph": "C",
                "pid": device,
                "name": "activations",
                "ts": when_s * _MICROSECONDS,
                "args": args,
            }
