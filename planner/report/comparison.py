"""Two plans term by term: what they choose, and the seconds and bytes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.plan import Plan
from planner.report.terminal import Screen, gib, percent, words

__all__ = ["comparison", "show_comparison"]


def comparison(a: Plan, b: Plan) -> dict[str, Any]:
    """Differences of plan ``b`` from plan ``a``; ``delta`` is b − a."""
    choices_a, choices_b = {**a.mesh, **a.knobs}, {**b.mesh, **b.knobs}
    return {
        "schema_version": a.schema_version,
        "a": _summary(a),
        "b": _summary(b),
        "job": _differing(_job(a), _job(b)),
        "choices": _differing(choices_a, choices_b),
        "step_time_s": _delta(a.estimate.step_time_s, b.estimate.step_time_s),
        "seconds": _deltas(a.estimate.breakdown_s, b.estimate.breakdown_s),
        "bytes": _deltas(a.estimate.memory_bytes, b.estimate.memory_bytes),
    }


def show_comparison(content: Mapping[str, Any]) -> None:
    """Prints a comparison."""
    screen = Screen()
    for name in ("a", "b"):
        one = content[name]
        screen.line(
            f"{name}: {one['model']} on {one['cluster']}, plan {one['id']}: {one['step_time_s']:.3f} s/step, "
            f"{one['tokens_per_s_per_device']:,.0f} tokens/s/device, MFU {one['mfu']:.1%}"
            + ("" if one["fits"] else ", DOES NOT FIT"),
            "bold",
        )
    for heading, part in (("Jobs differ", content["job"]), ("Choices", content["choices"])):
        told = [
            f"{words(name)}: {_said(values['a'])} → {_said(values['b'])}" for name, values in part.items()
        ]
        screen.section(heading, told)
    if not content["job"] and not content["choices"]:
        screen.section("Choices", ["the same"])
    step = content["step_time_s"]
    screen.line()
    rows = [
        (words(name), *(f"{v[k]:.4f}" for k in ("a", "b")), f"{v['delta']:+.4f}")
        for name, v in content["seconds"].items()
    ]
    rows.append(("step", f"{step['a']:.4f}", f"{step['b']:.4f}", f"{step['delta']:+.4f}"))
    tails = [percent(v["delta"], step["a"]) for v in content["seconds"].values()] + [
        percent(step["delta"], step["a"])
    ]
    screen.grid(("seconds", "a", "b", "b - a"), rows, ("seconds",), "of a", tails, (len(rows) - 1,))
    screen.line()
    held = content["bytes"]
    ordered = [*(name for name in held if name != "peak"), "peak"]
    rows = [
        (words(name), gib(held[name]["a"]), gib(held[name]["b"]), f"{held[name]['delta'] / 2**30:+.1f}")
        for name in ordered
    ]
    screen.grid(("GiB", "a", "b", "b - a"), rows, ("GiB",), bold=(len(rows) - 1,))


def _summary(plan: Plan) -> dict[str, Any]:
    e = plan.estimate
    return {
        "id": plan.id, "model": plan.model, "cluster": plan.cluster, "devices": plan.devices, "step_time_s": e.step_time_s,
        "tokens_per_s_per_device": e.tokens_per_s_per_device, "mfu": e.mfu, "fits": e.fits,
    }  # fmt: skip


def _job(plan: Plan) -> dict[str, Any]:
    return {"model": plan.model, "cluster": plan.cluster, "stack": plan.stack, **plan.workload}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys((*a, *b))
    return {name: {"a": a.get(name), "b": b.get(name)} for name in names if a.get(name) != b.get(name)}


def _deltas(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """All terms of either, the largest difference first."""
    found = {name: _delta(a.get(name, 0.0), b.get(name, 0.0)) for name in dict.fromkeys((*a, *b))}
    return dict(sorted(found.items(), key=lambda term: -abs(term[1]["delta"])))


def _delta(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b, "delta": b - a}


def _said(value: Any) -> str:
    return (
        "-" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()
    )
