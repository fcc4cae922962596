"""The screen of ``planner explain``: every second and byte of a plan, what binds, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.plans.plan import Plan
from planner.report.discrepancy import show_discrepancy
from planner.report.layers import layers
from planner.report.plan_table import unusual_knobs
from planner.report.ranking import does_not_fit
from planner.report.terminal import Screen, gib, knob_text, mesh_text, percent, told_knobs, words
from planner.units import format_seconds

__all__ = ["show_explanation"]

_SMALL = 0.005  # items below this share are folded into one line


def show_explanation(plan: Plan, content: Mapping[str, Any], everything: bool) -> None:
    """Prints an explanation; ``everything`` lists small items too."""
    screen = Screen()
    estimate = plan.estimate
    screen.line(f"{plan.model} on {plan.cluster}, plan {plan.id}", "bold")
    screen.line(
        " · ".join(
            [mesh_text(plan), *unusual_knobs(told_knobs(plan), ("virtual_stages", "micro_batch_size"))]
        )
    )
    rate = f"{format_seconds(estimate.step_time_s)}/step · {estimate.tokens_per_s_per_device:,.0f} tokens/s/device"
    peak = f"peak {gib(estimate.memory_bytes['peak'])} of {gib(estimate.memory_budget_bytes)} GiB"
    screen.line(f"{rate} · MFU {estimate.mfu:.1%}, HFU {estimate.hfu:.1%} · {peak}")
    if estimate.hfu < estimate.mfu:
        screen.line(
            "MFU counts attention over every pair of tokens, HFU what is executed: causal kernels skip half of it."
        )
    if not estimate.fits:
        screen.line(does_not_fit(plan), "bold red")
    if content["changed"]:
        screen.section("Changed since the plan was written", _changes(content["changed"]))
    if plan.layerwise is not None:
        heading, lines = layers([plan])
        found_by = content["found_by"]
        screen.section(heading, [*lines, *([] if found_by is None else [f"found by {found_by}"])])
    if content["discrepancy"] is not None:
        show_discrepancy(screen, content["discrepancy"], everything)
    _tree(screen, "Seconds of a step, on the busiest device", content["seconds"], "seconds", everything)
    _tree(screen, "Bytes at the peak, on the fullest device", content["bytes"], "bytes", everything)
    for tier, where in (("host", "In host memory"), ("cxl", "In CXL memory"), ("nvme", "On NVMe")):
        leaves = content["bytes"][tier]
        held = [f"{leaf['what']} {gib(leaf['bytes'])} GiB ({leaf['technique']})" for leaf in leaves]
        if held:
            screen.section(f"{where}, per device", held)
    binds = [f"{entry['what']}: {percent(entry['share'], 1.0)} {entry['text']}" for entry in content["binds"]]
    screen.section("What binds", binds)
    screen.section("What a little more would buy (tokens/s)", _gains(content["sensitivities"], estimate.fits))
    screen.section("Sources", _sources(content))
    screen.section("Rests on", plan.assumptions)


def _tree(screen: Screen, heading: str, tree: Mapping[str, Any], unit: str, everything: bool) -> None:
    """Categories and their items; unless everything is asked for, phases are joined and what is small is one line."""
    whole, timed = tree[unit], unit == "seconds"
    rows: list[list[str]] = []
    tails: list[str] = []
    bold: list[int] = []

    def add(amount: float, hidden_s: float, what: str, technique: str) -> None:
        hidden = [f"{hidden_s:.4f}" if hidden_s > 5e-5 else ""] if timed else []
        rows.append([_amount(amount, unit), percent(amount, whole), *hidden, what])
        tails.append(technique)

    for group in tree["children"]:
        items = _leaves(group["items"], unit, everything)
        shown = [leaf for leaf in items if everything or abs(leaf[unit]) >= _SMALL * whole]
        if len(shown) == len(items) - 1:  # one item is no longer than a line that says that there is one
            shown = items
        alone = len(items) == 1 and not everything
        bold.append(len(rows))
        hidden_s = sum(leaf["hidden_s"] for leaf in items)
        add(group[unit], hidden_s, words(group["name"]), items[0]["technique"] if alone else "")
        for leaf in () if alone else shown:
            add(leaf[unit], leaf["hidden_s"], f"  {leaf['what']}", leaf["technique"])
        rest = items[len(shown) :]
        if rest and shown and not alone:
            add(
                sum(leaf[unit] for leaf in rest),
                sum(leaf["hidden_s"] for leaf in rest),
                f"  {len(rest)} smaller",
                "",
            )
    screen.line()
    screen.line(f"{heading}: {_amount(whole, unit)} {'s' if timed else 'GiB'}", "bold")
    headings = ("s", "share", "hidden s", "what") if timed else ("GiB", "share", "what")
    screen.grid(headings, rows, ("what",), "technique", tails, bold)


def _leaves(items: Sequence[Mapping[str, Any]], unit: str, everything: bool) -> list[dict[str, Any]]:
    """Items as lines; phases and blocks of one item are joined, or named where everything is asked for."""
    joined: dict[tuple[str, str], dict[str, Any]] = {}
    for leaf in items:
        what = leaf["what"]
        if everything:
            where = " ".join(part for part in (leaf["block"], leaf.get("phase", "")) if part)
            what += f" ({where})" if where else ""
        line = joined.setdefault(
            (what, leaf["technique"]),
            {"what": what, "technique": leaf["technique"], unit: 0.0, "hidden_s": 0.0},
        )
        line[unit] += leaf[unit]
        line["hidden_s"] += leaf.get("alone_s", 0.0) - leaf.get("seconds", 0.0)
    return sorted(joined.values(), key=lambda line: -line[unit])


def _amount(amount: float, unit: str) -> str:
    return f"{amount:.4f}" if unit == "seconds" else f"{amount / 2**30:.2f}"


def _gains(entries: list[dict[str, Any]], fits: bool) -> list[str]:
    """One line per entry that buys something; the others together. ``fits``: whether the plan does as it is."""
    told, rest = [], []
    for entry in entries:
        if abs(entry["gain"]) >= 5e-5:
            told.append(_gain(entry, fits))
        elif entry["fits"] and not fits:
            told.append(f"{entry['what']}: this plan would fit")
        else:
            rest.append(entry["what"])
    return [*told, f"nothing: {', '.join(rest)}"] if rest else told


def _gain(entry: Mapping[str, Any], fits: bool) -> str:
    text = f"{entry['what']}: {100 * entry['gain']:+.2f} %"
    if entry["choices"]:
        text += f", with {' · '.join(knob_text(name, value) for name, value in entry['choices'].items())}"
    return f"{text}, which would not fit" if fits and not entry["fits"] else text


def _sources(content: Mapping[str, Any]) -> list[str]:
    found: dict[str, list[str]] = {}
    for tree in (content["seconds"], content["bytes"]):
        for group in tree["children"]:
            for leaf in group["items"]:
                sources = found.setdefault(leaf["technique"], [])
                if leaf["source"] and leaf["source"] not in sources:
                    sources.append(leaf["source"])
    return [f"{technique}: {', '.join(sources)}" for technique, sources in sorted(found.items()) if sources]


def _changes(changed: Mapping[str, Any]) -> list[str]:
    return [
        f"{words(name)}: {values['written']:.6g} then, {values['now']:.6g} now"
        for name, values in changed.items()
    ]
