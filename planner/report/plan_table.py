"""The table of ranked plans: what all share is said once above it, and plans that hardly differ stand on one row.

Near-twins have the same mesh, differ in one or two knobs, and are within half a percent: below what the model can tell apart. The
row is the best of them; the others follow below it with their numbers, by which ``explain`` and ``export`` find each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from planner.plans.plan import Plan
from planner.report.confidence import TIE, interval_text, out_of_memory_matters, relative_interval
from planner.report.terminal import Screen, gib, knob_text, knobs_that_differ, told_knobs, words
from planner.solve.fleet import objective_value
from planner.technique import SLOTS, off
from planner.uncertainty.ties import ties_with_first
from planner.units import format_chance, format_seconds

__all__ = ["Row", "rows", "show_plans", "unusual_knobs", "why_not"]

_ALIKE = 0.005  # relative difference in what is ranked
_ALIKE_INTERVALS = 0.05  # of the step: ends that differ by no more are told once
_FEW = 2  # knobs in which near-twins may differ
_OTHER_PEAK = 0.05  # a twin whose peak memory differs by more than this is shown with it
_DEGREES = ("tp", "pp", "cp", "ep", "etp", "dp")
_COLUMNS = {"virtual_stages": "vpp", "micro_batch_size": "mb", "zero_stage": "zero", "recompute": "recompute"}
# What a reader takes for granted where nothing else is said.
_USUAL = {slot: off(slot) for slot in SLOTS} | {
    "precision": "bf16", "attention_kernel": "flash", "loss_kernel": "fused", "tensor": "1d", "sequence_parallel": False,
    "context": "p2p", "expert": "folded", "pipeline": "stages", "optimizer": "adamw", "schedule": "1f1b",
    "pipeline_layout": "even", "gradient_dtype": "fp32", "virtual_stages": 1,
}  # fmt: skip
_OBJECTIVES = {"usd": "$/step", "energy": "MJ/step", "gpu_hours": "dev·h/step"}


class Row(NamedTuple):
    """One plan with its number in the ranking (from 1), and the near-twins behind it with theirs."""

    number: int
    plan: Plan
    twins: list[tuple[int, Plan]]


def rows(plans: Sequence[Plan], objective: str = "step_time") -> list[Row]:
    """The ranking with every plan on the row of the first one that it is a near-twin of, or on its own."""
    found: list[Row] = []
    for number, plan in enumerate(plans, 1):
        row = next((row for row in found if _twins(row.plan, plan, objective)), None)
        if row is None:
            found.append(Row(number, plan, []))
        else:
            row.twins.append((number, plan))
    return found


def show_plans(
    screen: Screen, plans: Sequence[Plan], objective: str, *, joined: bool = True, where: str = ""
) -> None:
    """Prints the table; with ``joined``, near-twins share a row. ``where`` is said of every plan."""
    several = len(plans) > 1
    differ, common = knobs_that_differ(plans)
    own = [name for name in _COLUMNS if name in differ or not several]
    rest = [name for name in differ if name not in own]
    interval = _shared_interval(plans) if several else ""
    shared = [text for text in (where, interval and f"step s {interval}") if text] + unusual_knobs(
        common, own
    )
    screen.section("Every plan" if several else "Plan", [" · ".join(shared)] if shared else [])
    shown = rows(plans, objective) if joined else [Row(n, plan, []) for n, plan in enumerate(plans, 1)]
    ties = set(ties_with_first(plans))
    cells = [_cells(row, plans, own, objective, row.plan.id in ties) for row in shown]
    tails, below = [], []
    for row in shown:
        knobs = told_knobs(row.plan)
        chosen = ", ".join(unusual_knobs({name: knobs[name] for name in rest if name in knobs}))
        lost = why_not(row.plan, plans[0])
        tails.append("; ".join(text for text in (lost, chosen) if text not in ("", "-")) or lost)
        told = [_twin_text(row.plan, number, twin, objective) for number, twin in row.twins]
        below.append(f"also {', '.join(told)}" if told else "")
    screen.line()
    screen.grid(
        list(cells[0]), [list(row.values()) for row in cells], ("cluster", "recompute"), "why not #1; other choices",
        tails if several else (), below=below,
    )  # fmt: skip


def why_not(plan: Plan, best: Plan) -> str:
    """The largest part of the step in which a plan loses to the best one.

    On another cluster seconds do not compare, and the cluster is the reason.
    """
    if plan is best:
        return "-"
    if plan.cluster != best.cluster:
        return "another cluster"
    mine, other = plan.estimate.breakdown_s, best.estimate.breakdown_s
    worse = {name: mine.get(name, 0.0) - other.get(name, 0.0) for name in {**mine, **other}}
    name = max(sorted(worse), key=lambda term: worse[term])
    return f"{words(name)} +{format_seconds(worse[name])}" if worse[name] > 0 else "-"


def unusual_knobs(knobs: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
    """The knobs that are not what one takes for granted, in words."""
    return [
        knob_text(name, value)
        for name, value in knobs.items()
        if name not in without and value != _USUAL.get(name)
    ]


# -- details ---------------------------------------------------------------------------------------------------------


def _twins(one: Plan, other: Plan, objective: str) -> bool:
    """Whether the other plan, which is ranked later, is hardly a choice of its own."""
    if one.cluster != other.cluster or one.mesh != other.mesh or one.layerwise != other.layerwise:
        return False
    return _behind(other, one, objective) <= _ALIKE and len(knobs_that_differ((one, other))[0]) <= _FEW


def _behind(plan: Plan, best: Plan, objective: str) -> float:
    """By how much a plan is worse in what is ranked, relative to the best."""
    return objective_value(plan, objective) / objective_value(best, objective) - 1.0


def _shared_interval(plans: Sequence[Plan]) -> str:
    """The interval of all steps, where it is nearly the same for all: the widest of them."""
    ends = [relative_interval(plan.estimate) for plan in plans]
    known = [both for both in ends if both is not None]
    if len(known) < len(plans):
        return ""
    apart = max(max(side) - min(side) for side in zip(*known, strict=True))
    widest = max(plans, key=lambda plan: _width(relative_interval(plan.estimate)))
    return interval_text(widest.estimate) if apart <= _ALIKE_INTERVALS else ""


def _width(ends: tuple[float, float] | None) -> float:
    return 0.0 if ends is None else ends[1] - ends[0]


def _cells(row: Row, plans: Sequence[Plan], own: Sequence[str], objective: str, tie: bool) -> dict[str, str]:
    """Heading → cell of one row; the headings are the same for all rows of a table."""
    plan, several = row.plan, len(plans) > 1
    e = plan.estimate
    cells: dict[str, str] = {"#": str(row.number)} if several else {}
    if len({p.cluster for p in plans}) > 1:
        cells["cluster"] = plan.cluster
    for name in _DEGREES:
        if name in ("tp", "pp", "dp") or any(p.mesh[name] > 1 for p in plans):
            cells[name] = str(plan.mesh[name])
    cells |= {_COLUMNS[name]: str(told_knobs(plan).get(name, "-")) for name in own}
    told_above = several and _shared_interval(plans)
    cells["step s"] = f"{e.step_time_s:.3f} {'' if told_above else interval_text(e)}".rstrip()
    if several:
        behind = f"{100 * _behind(plan, plans[0], objective):+.1f}%"
        cells["vs #1"] = "" if plan is plans[0] else f"{TIE if tie else ''}{behind}"
    cells |= {"tok/s/dev": f"{e.tokens_per_s_per_device:,.0f}", "MFU": f"{100 * e.mfu:.1f}%"}
    budgets = {p.estimate.memory_budget_bytes for p in plans}
    peak, budget = gib(e.memory_bytes["peak"]), gib(e.memory_budget_bytes)
    if len(budgets) == 1:
        cells[f"GiB of {budget}"] = peak
    else:
        cells["peak GiB"] = f"{peak}/{budget}"
    if out_of_memory_matters(plans):
        cells["OOM"] = format_chance(e.oom_probability)
    if objective in _OBJECTIVES:
        cells[_OBJECTIVES[objective]] = _objective_text(plan, objective)
    return cells


def _twin_text(plan: Plan, number: int, twin: Plan, objective: str) -> str:
    """``#2 vpp 10 (+0.1 %)``, with its peak where that is another."""
    differ, _ = knobs_that_differ((plan, twin))
    knobs = " ".join(knob_text(name, told_knobs(twin).get(name)) for name in differ)
    behind = f"{100 * _behind(twin, plan, objective):+.1f} %"
    peak, own = twin.estimate.memory_bytes["peak"], plan.estimate.memory_bytes["peak"]
    held = f", {gib(peak)} GiB" if abs(peak / own - 1.0) > _OTHER_PEAK else ""
    return f"#{number} {knobs} ({behind}{held})"


def _objective_text(plan: Plan, objective: str) -> str:
    e = plan.estimate
    if objective == "usd":
        return f"{e.usd_per_step:.3f}"
    if objective == "energy":
        return f"{e.joules_per_step / 1e6:.3f}"
    return f"{e.step_time_s * plan.devices / 3600:.2f}"
