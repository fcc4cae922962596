"""Where a plan's seconds and bytes go: category → item → technique → source, as trees that add up."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from planner.pipeline.composer import SLOWER
from planner.plans.assemble import Assembly
from planner.plans.holdings import Holding, holdings
from planner.technique import discover

__all__ = ["binding", "byte_tree", "second_tree"]


def second_tree(assembly: Assembly) -> dict[str, Any]:
    """Seconds of one step on the busiest device; the leaves add up to ``seconds``.

    A leaf says how often it happens (``times``), how long it would take if nothing hid it (``alone_s``), and what is left
    of that in the step (``seconds``).
    """
    leaves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for spent in assembly.spends:
        if not spent.alone_s:
            continue
        item, share = spent.share.item, spent.share
        technique = "software stack" if item is None else item.by
        leaves[spent.category].append(
            {
                "what": "host dispatch" if item is None else item.what,
                "block": share.block,
                "phase": share.phase,
                "technique": technique,
                "source": _source(technique, "" if item is None else item.source),
                "times": spent.times,
                "alone_s": spent.alone_s,
                "seconds": spent.seconds,
            }
        )
    step_s = assembly.plan.estimate.step_time_s
    bubble_s = assembly.plan.estimate.breakdown_s.get("pipeline_bubble", 0.0)
    if bubble_s:
        leaves["pipeline_bubble"] = [_bubble(assembly, bubble_s)]
    return {"seconds": step_s, "children": _sorted_groups(leaves, "seconds")}


def byte_tree(assembly: Assembly) -> dict[str, Any]:
    """Bytes of the fullest device at its peak; the leaves add up to ``bytes``. Slower tiers stand beside it."""
    leaves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for held in holdings(assembly):
        technique = "software stack" if held.item is None else held.item.by
        leaves[held.pool].append(
            {
                "what": _named(held),
                "block": held.block,
                "technique": technique,
                "source": _source(technique, "" if held.item is None else held.item.source),
                "bytes": held.n_bytes,
            }
        )
    slower = {tier: sorted(leaves.pop(tier, []), key=lambda leaf: -leaf["bytes"]) for tier in SLOWER}
    return {
        "bytes": assembly.plan.estimate.memory_bytes["peak"],
        "budget_bytes": assembly.plan.estimate.memory_budget_bytes,
        "children": _sorted_groups(leaves, "bytes"),
        **slower,
    }


def binding(assembly: Assembly) -> list[dict[str, Any]]:
    """What holds the plan back: ``what``, its ``share``, and ``text`` that says of what it is a share."""
    estimate = assembly.plan.estimate
    step_s, parts = estimate.step_time_s, estimate.breakdown_s
    peak, budget = estimate.memory_bytes["peak"], estimate.memory_budget_bytes
    full = peak / budget
    verdict = "does not fit" if full > 1.0 else "binds" if full > 0.95 else "to spare"
    text = f"of the memory that a plan may use, at the peak: {verdict}"
    found = [{"what": "memory", "share": full, "text": text}]
    compute_s = sum(parts.get(name, 0.0) for name in ("matmul", "attention", "recompute"))
    text = "of the step in matrix products, attention and their recomputation"
    found.append({"what": "compute", "share": compute_s / step_s, "text": text})
    exposed = [
        leaf
        for group in second_tree(assembly)["children"]
        for leaf in group["items"]
        if group["name"] in _COMMUNICATION and leaf["seconds"]
    ]
    if exposed:
        worst = max(exposed, key=lambda leaf: leaf["seconds"])
        total_s = sum(leaf["seconds"] for leaf in exposed)
        text = f"of the step in exposed communication, most of it {worst['what']} ({worst['phase']})"
        found.append({"what": "communication", "share": total_s / step_s, "text": text})
    bubble_s = parts.get("pipeline_bubble", 0.0)
    if bubble_s > 0.0:
        text = "of the step waiting for other stages (bubble and hops)"
        found.append({"what": "pipeline", "share": bubble_s / step_s, "text": text})
    return found


# -- details ---------------------------------------------------------------------------------------------------------

_COMMUNICATION = (
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "resharding",
    "data_parallel",
    "tied_embedding",
    "offload",
)
_MODEL_SOURCE = "the model's own operations"
_STACK_SOURCE = "the software stack's file"


def _source(technique: str, own: str) -> str:
    """Where an item's formula comes from: its own source, else its technique's."""
    if own:
        return own
    if technique == "model":
        return _MODEL_SOURCE
    if technique == "software stack":
        return _STACK_SOURCE
    known = discover().get(technique)
    return known.source if known is not None else ""


def _bubble(assembly: Assembly, bubble_s: float) -> dict[str, Any]:
    schedule = str(assembly.plan.knobs["schedule"])
    techniques = [t for t in discover("training").values() if t.slot == "schedule" and schedule in t.choices]
    technique = techniques[0].key if techniques else schedule
    return {
        "what": "idle", "block": "", "phase": "step", "technique": technique,
        "source": _source(technique, ""), "times": 1.0, "alone_s": bubble_s, "seconds": bubble_s,
    }  # fmt: skip


def _named(held: Holding) -> str:
    return held.pool if held.item is None else held.item.what


def _sorted_groups(leaves: dict[str, list[dict[str, Any]]], unit: str) -> list[dict[str, Any]]:
    groups = [
        {
            "name": name,
            unit: sum(leaf[unit] for leaf in items),
            "items": sorted(items, key=lambda leaf: -leaf[unit]),
        }
        for name, items in leaves.items()
    ]
    return sorted(groups, key=lambda group: -group[unit])
