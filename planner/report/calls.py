"""The calls of a step of reinforcement learning: where each runs, from when to when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import Infeasible
from planner.report.terminal import Screen
from planner.serving.rlhf import RlhfJob
from planner.solve.combinatorial.calls import CallPlan, CallProblem, on_all_devices
from planner.units import format_count, format_seconds

__all__ = ["content_of", "show_calls"]

_BASELINE_S = 10.0  # of search for the plan that others are compared with: it has few options


def content_of(job: RlhfJob, problem: CallProblem, plan: CallPlan) -> dict[str, Any]:
    """A plan as JSON fields; ``on_all_devices_s`` is the step in which every call has all devices, None if that does not fit."""
    try:
        plain: float | None = on_all_devices(problem, time_limit_s=_BASELINE_S).time_s
    except Infeasible:
        plain = None
    calls = [
        {
            "call": call.name, "model": job.models[call.model].name, "first": option.first, "devices": option.devices,
            "layout": option.layout, "start_s": start, "end_s": end, "moved": moved,
            "peak_bytes": option.peak_bytes,
        }
        for call, option, start, end, moved in zip(
            problem.calls, plan.options, plan.start_s, plan.end_s, plan.moves, strict=True
        )
    ]  # fmt: skip
    return {
        "cluster": job.cluster.name, "algorithm": job.algorithm, "devices": problem.devices, "staleness": job.staleness,
        "time_s": plan.time_s, "tokens_per_s": job.prompts * job.tokens / plan.time_s, "idle": plan.idle,
        "on_all_devices_s": plain, "calls": calls, "certificate": plan.certificate.as_dict(),
    }  # fmt: skip


def show_calls(content: Mapping[str, Any]) -> None:
    """Prints it."""
    from planner.report.optimum import show_proof

    screen = Screen()
    screen.line(
        f"{content['algorithm'].upper()} on {content['cluster']}: {format_seconds(content['time_s'])} per step, "
        f"{format_count(content['tokens_per_s'])} tokens/s, {content['idle']:.1%} idle",
        "bold",
    )
    plain = content["on_all_devices_s"]
    if plain is None:
        screen.line("with all devices for every call, nothing fits")
    else:
        screen.line(
            f"with all devices for every call {format_seconds(plain)}, {plain / content['time_s']:.2f} times as long"
        )
    if content["staleness"]:
        screen.line(
            f"steps overlap: {content['staleness']} further under way; times are of one step on its own"
        )
    screen.line()
    rows = [
        (
            c["call"], f"{c['first']}-{c['first'] + c['devices'] - 1}", c["layout"], format_seconds(c["start_s"]),
            format_seconds(c["end_s"]), "moved" if c["moved"] else "",
        )
        for c in content["calls"]
    ]  # fmt: skip
    screen.grid(("call", "devices", "layout", "from", "to", "weights"), rows, ("call", "layout", "weights"))
    show_proof(screen, content["certificate"], format_seconds)
