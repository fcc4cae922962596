"""Two plans term by term: what they choose, and the seconds and bytes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.plans.plan import Plan
from planner.report.terminal import Screen, gib, told_knobs, words
from planner.units import GIB

__all__ = ["comparison", "show_comparison"]


def comparison(a: Plan, b: Plan) -> dict[str, Any]:
    """Differences of plan ``b`` from plan ``a``; ``delta`` is b − a."""
    choices_a, choices_b = {**a.mesh, **told_knobs(a)}, {**b.mesh, **told_knobs(b)}
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
    screen.line(_verdict(content))
    for heading, part in (("Jobs differ", content["job"]), ("Choices", content["choices"])):
        told = [
            f"{words(name)}: {_said(values['a'])} → {_said(values['b'])}" for name, values in part.items()
        ]
        screen.section(heading, told)
    if not content["job"] and not content["choices"]:
        screen.section("Choices", ["the same"])
    step, peak = content["step_time_s"], content["bytes"]["peak"]
    pools = {name: held for name, held in content["bytes"].items() if name != "peak"}
    _terms(screen, "seconds", content["seconds"], ("step", step), 1.0, 4)
    _terms(screen, "GiB", pools, ("peak", peak), GIB, 1)


# -- details ---------------------------------------------------------------------------------------------------------


def _verdict(content: Mapping[str, Any]) -> str:
    """Which is faster and which is smaller, in a sentence; across jobs, only what can be compared."""
    a, b, peak = content["a"], content["b"], content["bytes"]["peak"]["delta"]
    gain = b["tokens_per_s_per_device"] / a["tokens_per_s_per_device"] - 1.0
    if abs(gain) < 5e-4:
        speed = "b is as fast as a per device"
    else:
        speed = f"b does {abs(gain):.1%} {'more' if gain > 0.0 else 'fewer'} tokens per second and device"
    if abs(peak) < 0.05 * GIB:
        return f"{speed}, with the same peak memory."
    return f"{speed}, and peaks {gib(abs(peak))} GiB {'higher' if peak > 0.0 else 'lower'}."


def _terms(
    screen: Screen, unit: str, terms: Mapping[str, Mapping[str, float]], total: tuple[str, Mapping[str, float]],
    scale: float, digits: int,
) -> None:  # fmt: skip
    """Terms that differ and their total as a table, and the others in a line."""

    def number(value: float, sign: str = "") -> str:
        return f"{value / scale:{sign}.{digits}f}"

    same = {name: v for name, v in terms.items() if abs(v["delta"]) / scale < 0.5 * 10**-digits}
    shown = [*((n, v) for n, v in terms.items() if n not in same), total]
    whole = total[1]["a"]
    rows = [
        (
            words(name), number(v["a"]), number(v["b"]), number(v["delta"], "+"),
            f"{100.0 * v['delta'] / whole:+.1f} %",
        )
        for name, v in shown
    ]  # fmt: skip
    screen.line()
    screen.grid((unit, "a", "b", "b - a", f"of a's {total[0]}"), rows, (unit,), bold=(len(rows) - 1,))
    if same:
        told = [f"{words(name)} {number(values['a'])}" for name, values in same.items()]
        screen.line(f"the same: {', '.join(told)}", "dim")


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
