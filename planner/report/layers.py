"""A layer-wise plan on the screen: what each strategy is, and which layers of which stage take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.pipeline.assignment import label
from planner.plans.plan import Plan, SearchResult
from planner.report.terminal import knob_text
from planner.technique import off
from planner.units import format_seconds

__all__ = ["layers", "layerwise_proof", "mixed_proof"]


def layers(plans: Sequence[Plan]) -> tuple[str, list[str]]:
    """A heading and lines for the first layer-wise plan of a list; no lines where there is none."""
    for number, plan in enumerate(plans, 1):
        if plan.layerwise is not None:
            which = f"plan {number}" if len(plans) > 1 else "the plan"
            return f"Layers of {which}", [*_places(plan), *_strategies(plan), *_stages(plan)]
    return "", []


def layerwise_proof(result: SearchResult) -> list[str]:
    """How the layer-wise space was exhausted, in words."""
    return _account(result.layerwise, "Layer by layer", "meshes")


def mixed_proof(result: SearchResult) -> list[str]:
    """How the space of stages and layers with degrees of their own was exhausted, in words."""
    return _account(result.mixed, None, "orders, numbers of stages and of micro-batches")


def _account(account: Mapping[str, Any] | None, which: str | None, parts: str) -> list[str]:
    """How a space was exhausted, by the account of its search."""
    if account is None:
        return []
    excluded = "; ".join(f"{name} {n:,}" for name, n in account["excluded"].items() if n)
    which = which or f"Over {account['space']}"
    told = (
        f"{which}: {account['parts']:,} {parts}, {account['settled']:,} settled and priced by the schedule engine; "
        f"excluded by a bound: {excluded or 'none'}; {account['open']:,} left open; "
        f"solver {account['solver']}, {format_seconds(account['wall_s'])}."
    )
    return [told + _ENDED.get(account["stopped"], "")]


_ENDED = {"time": " Stopped by --time-limit.", "interrupted": " Interrupted."}


def _places(plan: Plan) -> list[str]:
    """How work is cut and on which node group, by the stages or, where layers of a stage differ, by number."""
    lines = []
    for number, place in enumerate(plan.places):
        first, last = place["stages"][0], place["stages"][-1]
        which = f"stage {first}" if first == last else f"stages {first}-{last}"
        degrees = [f"{name} {n}" for name, n in place["mesh"].items() if n > 1] + [
            f"mb {place['micro_batch_size']}"
        ]
        chosen = [
            knob_text(slot, value)
            for slot, value in place["choices"].items()
            if str(value).lower() != off(slot) and plan.knobs.get(slot) != value
        ]
        ranks = place["mesh"]["tp"] * place["mesh"]["cp"] * place["mesh"]["dp"]
        if _numbered(plan):
            which = f"degrees {number}"
        lines.append(f"{which} on {ranks} × {place['device']}: {' · '.join([*degrees, *chosen])}")
    return lines


def _numbered(plan: Plan) -> bool:
    """Whether the same degrees return in the pipeline, or several stand in one stage."""
    assert plan.layerwise is not None
    stages = [stage for place in plan.places for stage in place["stages"]]
    return stages != sorted(set(stages))


def _strategies(plan: Plan) -> list[str]:
    """One line per strategy: its letter, how many layers take it, and what it chooses."""
    assert plan.layerwise is not None
    layerwise, numbered = plan.layerwise, _numbered(plan)
    counts: dict[int, int] = {}
    for runs in layerwise["stages"]:
        for s, n in runs:
            counts[s] = counts.get(s, 0) + n
    lines = []
    for s, choices in enumerate(layerwise["strategies"]):
        chosen = [
            knob_text(slot, value) for slot, value in choices.items() if str(value).lower() != off(slot)
        ]
        where = [_layers(counts[s])] if s in counts else []
        where += [end for end in ("embedding", "head") if layerwise[end] == s]
        where += [f"degrees {layerwise['at'][s]}"] if numbered else []
        lines.append(
            f"{label(s)}  {', '.join(where)}: {' · '.join(chosen) or 'nothing sharded, recomputed or offloaded'}"
        )
    return lines


def _stages(plan: Plan) -> list[str]:
    """Stages with their layers' strategies; equal neighbours share a line."""
    assert plan.layerwise is not None
    stages, single = plan.layerwise["stages"], plan.mesh["pp"] * plan.knobs["virtual_stages"] == 1
    texts = [" ".join(f"{n}{label(s)}" for s, n in runs) or "none" for runs in stages]
    lines, start = [], 0
    for stage in range(1, len(texts) + 1):
        if stage == len(texts) or texts[stage] != texts[start]:
            which = f"stage {start}" if stage - start == 1 else f"stages {start}-{stage - 1}"
            total = sum(n for _, n in stages[start])
            lines.append(f"{which}: " * (not single) + f"{_layers(total)}: {texts[start]}")
            start = stage
    return lines


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"
