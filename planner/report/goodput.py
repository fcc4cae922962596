"""What failures and checkpoints leave of a plan: the best interval between checkpoints, goodput, the run's real length.

Preempted spot instances are failures too: their mean time between preemptions, with the spot price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.assemble import Assembly
from planner.costs.reliability import (
    best_interval_s,
    checkpoint_stall_s,
    daly_interval_s,
    expected_slowdown,
    fleet_mtbf_s,
    young_interval_s,
)
from planner.report.totals import run_totals
from planner.specs.device import Sourced

__all__ = ["DEVICE_MTBF_S", "MODES", "RESTART_S", "STORE_BYTES_PER_S", "Failures", "goodput", "show_goodput"]

MODES = ("sync", "async", "lazy")

_LLAMA_3 = "Grattafiori et al. 2024 (Llama 3, arXiv:2407.21783)"
DEVICE_MTBF_S = Sourced(
    54 * 86400 * 16384 / 419, "measured", f"{_LLAMA_3}, Table 5: 419 failures in 54 days of 16,384 H100"
)
STORE_BYTES_PER_S = Sourced(
    2e12 / 16384, "measured", f"{_LLAMA_3}, section 3.3.1: 2 TB/s sustained for 16,384 devices"
)
RESTART_S = Sourced(600.0, "assumed", "ten minutes to notice a failure, replace the node and start again")


@dataclass(frozen=True, slots=True)
class Failures:
    """How often devices fail, and how a job gets over it.

    Attributes:
        device_mtbf_s: mean time between failures of one device (and its share of host and network).
        restart_s: from a failure until the job loads its last checkpoint.
        mode: ``sync``, ``async`` or ``lazy`` (:func:`planner.costs.reliability.checkpoint_stall_s`).
        store_bytes_per_s: what one device's checkpoint is stored and loaded at.
        interval_s: work between checkpoints; None for the best one.
    """

    device_mtbf_s: float = DEVICE_MTBF_S.value
    restart_s: float = RESTART_S.value
    mode: str = "async"
    store_bytes_per_s: float = STORE_BYTES_PER_S.value
    interval_s: float | None = None


def goodput(assembly: Assembly, failures: Failures, host_link_bytes_per_s: float) -> dict[str, Any]:
    """Everything about a plan's failures as JSON fields; ``run`` only where the length of the run is known.

    A checkpoint that is stored beside training is worth something once it is stored: the next one starts no earlier, and a
    failure loses that time as well.
    """
    plan, step_s = assembly.plan, assembly.plan.estimate.step_time_s
    n_bytes = checkpoint_bytes(assembly)
    stored_s = n_bytes / failures.store_bytes_per_s
    compute_s = step_s - plan.estimate.breakdown_s.get("optimizer", 0.0)
    stall_s = float(
        checkpoint_stall_s(
            failures.mode, n_bytes, failures.store_bytes_per_s, host_link_bytes_per_s, compute_s
        )
    )
    mtbf_s = float(fleet_mtbf_s(failures.device_mtbf_s, plan.devices))
    best_s = max(
        float(best_interval_s(stall_s, mtbf_s)), step_s, 0.0 if failures.mode == "sync" else stored_s
    )
    interval_s = best_s if failures.interval_s is None else failures.interval_s
    behind_s = 0.0 if failures.mode == "sync" else stored_s
    restart_s = failures.restart_s + stored_s + behind_s
    slowdown = float(expected_slowdown(interval_s, stall_s, restart_s, mtbf_s))
    found: dict[str, Any] = {
        "plan": plan.id,
        "mode": failures.mode,
        "device_mtbf_s": failures.device_mtbf_s,
        "mtbf_s": mtbf_s,
        "checkpoint_bytes_per_device": n_bytes,
        "stall_s": stall_s,
        "stored_s": stored_s,
        "interval_s": interval_s,
        "best_interval_s": best_s,
        "young_interval_s": float(young_interval_s(stall_s, mtbf_s)),
        "daly_interval_s": float(daly_interval_s(stall_s, mtbf_s)),
        "restart_s": restart_s,
        "goodput": 1.0 / slowdown,
        "lost": _lost(interval_s, stall_s, restart_s, slowdown),
        "expected_step_s": step_s * slowdown,
    }
    run = run_totals(plan)
    if run is not None:
        scaled = ("run_s", "device_hours", "joules", "usd")
        found["run"] = {k: v * slowdown if k in scaled and v is not None else v for k, v in run.items()}
        found["run"]["failures"] = found["run"]["run_s"] / mtbf_s
    return found


def checkpoint_bytes(assembly: Assembly) -> float:
    """Bytes that the fullest device writes: its optimizer states, and its part of the weights that all replicas hold.

    Where states are not sharded, replicas share the writing.
    """
    layout, table, mesh = assembly.layout, assembly.table, assembly.plan.mesh
    replicas = float(mesh["dp"] * mesh["cp"])
    per_kind = [0.0] * len(table.kinds)
    for item, block, held in assembly.residents():
        if item.lifetime == "always" and item.pool in ("optimizer", "parameters"):
            whole = "/zero_" not in item.size
            per_kind[table.kinds.index(block)] += held / replicas if whole else held
    return max(float(counts @ per_kind) for counts in layout.device_counts) / layout.copies


def _lost(interval_s: float, stall_s: float, restart_s: float, slowdown: float) -> Mapping[str, float]:
    """Fractions of the run's time: checkpoints, and failures with the work that they undo."""
    checkpoints = stall_s / interval_s / slowdown
    return {"checkpoints": checkpoints, "failures": 1.0 - 1.0 / slowdown - checkpoints}


def show_goodput(assembly: Assembly, content: Mapping[str, Any]) -> None:
    """Prints it."""
    from planner.report.terminal import Screen
    from planner.units import format_bytes, format_seconds

    screen, plan = Screen(), assembly.plan
    lost = content["lost"]
    screen.line(f"{plan.model} on {plan.cluster}: goodput {content['goodput']:.1%}", "bold")
    screen.line(
        f"step {format_seconds(plan.estimate.step_time_s)}, {format_seconds(content['expected_step_s'])} with failures; "
        f"lost {lost['checkpoints']:.2%} to checkpoints and {lost['failures']:.2%} to failures"
    )
    rows = [
        ("a failure every", format_seconds(content["mtbf_s"])),
        ("a restart costs", format_seconds(content["restart_s"])),
        ("a checkpoint holds, per device", format_bytes(content["checkpoint_bytes_per_device"])),
        (f"  stalls training ({content['mode']})", format_seconds(content["stall_s"])),
        ("  is stored after", format_seconds(content["stored_s"])),
        ("work between checkpoints", format_seconds(content["interval_s"])),
        ("  best", format_seconds(content["best_interval_s"])),
        (
            "  Young, Daly",
            ", ".join(format_seconds(content[f"{name}_interval_s"]) for name in ("young", "daly")),
        ),
    ]
    screen.line()
    screen.grid(("", "value"), rows, ("",))
    run = content.get("run")
    if run is not None:
        price = "" if run["usd"] is None else f", {run['usd']:,.0f} $"
        text = f"{format_seconds(run['run_s'])} with {run['failures']:,.0f} failures, {run['device_hours']:,.0f} device hours"
        screen.section("The run", [text + price])
    defaults = (
        ("mean time between failures", DEVICE_MTBF_S),
        ("store", STORE_BYTES_PER_S),
        ("restart", RESTART_S),
    )
    screen.section("Rests on (unless given)", [f"{name}: {x.kind}, {x.source}" for name, x in defaults])
