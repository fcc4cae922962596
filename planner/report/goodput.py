"""What failures and checkpoints leave of a plan: the best interval between checkpoints, goodput, the run's real length.

Preempted spot instances are failures too: their mean time between preemptions, with the spot price. A job gets over a lost device
in one of three ways (:data:`RECOVERIES`): it waits for another one, goes on with the replicas that are left (Varuna), or goes on
with the work that a neighbour in the pipeline holds as well (Bamboo).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.costs.reliability import (
    adjacent_mtbf_s,
    best_interval_s,
    checkpoint_stall_s,
    daly_interval_s,
    expected_slowdown,
    fleet_mtbf_s,
    out_share,
    useful_share,
    whole_replicas,
    young_interval_s,
)
from planner.errors import InvalidPlan, Problem
from planner.pipeline.composer import phase_seconds
from planner.plans.assemble import Assembly
from planner.report.totals import energy_text, run_totals
from planner.specs.device import Sourced
from planner.specs.problem import Problem as Job
from planner.units import format_bytes, format_count, format_seconds

__all__ = [
    "DETECT_S",
    "DEVICE_MTBF_S",
    "MODES",
    "RECOVERIES",
    "RESTART_S",
    "STORE_BYTES_PER_S",
    "Failures",
    "goodput",
    "others",
    "show_goodput",
]

MODES = ("sync", "async", "lazy")

_LLAMA_3 = "Grattafiori et al. 2024 (Llama 3, arXiv:2407.21783)"
DEVICE_MTBF_S = Sourced(
    54 * 86400 * 16384 / 419, "measured", f"{_LLAMA_3}, Table 5: 419 failures in 54 days of 16,384 H100"
)
STORE_BYTES_PER_S = Sourced(
    2e12 / 16384, "measured", f"{_LLAMA_3}, section 3.3.1: 2 TB/s sustained for 16,384 devices"
)
DETECT_S = Sourced(60.0, "assumed", "a minute to notice a failure and to find what failed")
RESTART_S = Sourced(540.0, "assumed", "nine minutes to start processes, communicators and kernels again")
RECOVERIES = {
    "restart": "waits for another device",
    "elastic": "goes on with the replicas that can be formed",
    "redundant": "goes on where a neighbour holds the same stage",
}


@dataclass(frozen=True, slots=True)
class Failures:
    """How often devices fail, and how a job gets over it.

    Attributes:
        device_mtbf_s: mean time between failures of one device (and its share of host and network).
        detect_s: from a failure until it is known what failed.
        restart_s: from then until the job loads its last checkpoint.
        replace_s: until another device is there; 0 where spares are at hand.
        recovery: one of :data:`RECOVERIES`.
        mode: ``sync``, ``async`` or ``lazy`` (:func:`planner.costs.reliability.checkpoint_stall_s`).
        store_bytes_per_s: what one device's checkpoint is stored and loaded at.
        interval_s: work between checkpoints; None for the best one.
    """

    device_mtbf_s: float = DEVICE_MTBF_S.value
    detect_s: float = DETECT_S.value
    restart_s: float = RESTART_S.value
    replace_s: float = 0.0
    recovery: str = "restart"
    mode: str = "async"
    store_bytes_per_s: float = STORE_BYTES_PER_S.value
    interval_s: float | None = None


def goodput(
    assembly: Assembly, failures: Failures, host_link_bytes_per_s: float, problem: Job | None = None
) -> dict[str, Any]:
    """Everything about a plan's failures as JSON fields; ``run`` only where the length of the run is known.

    A checkpoint that is stored beside training is worth something once it is stored: the next one starts no earlier, and a
    failure loses that time as well.

    Raises:
        InvalidPlan: the plan has no neighbours, or no room, for redundant stages.
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
    loss = _loss(assembly, failures, stored_s, mtbf_s)
    best_s = max(
        float(best_interval_s(stall_s, loss.mtbf_s)), step_s, 0.0 if failures.mode == "sync" else stored_s
    )
    interval_s = best_s if failures.interval_s is None else failures.interval_s
    behind_s = 0.0 if failures.mode == "sync" else stored_s
    restart_s = loss.restart_s + behind_s
    rolled_back = float(expected_slowdown(interval_s, stall_s, restart_s, loss.mtbf_s))
    slowdown = rolled_back * loss.slowdown
    found: dict[str, Any] = {
        "plan": plan.id,
        "mode": failures.mode,
        "recovery": failures.recovery,
        "device_mtbf_s": failures.device_mtbf_s,
        "mtbf_s": mtbf_s,
        "restarts_every_s": loss.mtbf_s,
        "checkpoint_bytes_per_device": n_bytes,
        "stall_s": stall_s,
        "stored_s": stored_s,
        "interval_s": interval_s,
        "best_interval_s": best_s,
        "young_interval_s": float(young_interval_s(stall_s, loss.mtbf_s)),
        "daly_interval_s": float(daly_interval_s(stall_s, loss.mtbf_s)),
        "restart_s": restart_s,
        "goodput": 1.0 / slowdown,
        "lost": _lost(interval_s, stall_s, rolled_back, slowdown),
        "expected_step_s": step_s * slowdown,
    }
    run = run_totals(plan, problem)
    if run is not None:
        scaled = ("run_s", "device_hours", "joules", "meter_joules", "kg_co2e", "usd")
        found["run"] = {k: v * slowdown if k in scaled and v is not None else v for k, v in run.items()}
        found["run"]["failures"] = found["run"]["run_s"] / mtbf_s
    return found


def others(assembly: Assembly, failures: Failures, host_link_bytes_per_s: float) -> dict[str, float | str]:
    """Goodput with the other ways to recover; of those that the plan cannot take, why not."""
    found: dict[str, float | str] = {}
    for name in RECOVERIES:
        if name != failures.recovery:
            try:
                other = replace(failures, recovery=name, interval_s=None)
                found[name] = goodput(assembly, other, host_link_bytes_per_s)["goodput"]
            except InvalidPlan as error:
                found[name] = error.problems[0].found
    return found


@dataclass(frozen=True, slots=True)
class _Loss:
    """What failures do to a run: how far apart those are that undo work, what each costs before the checkpoint is behind, and by
    how much the time between them is longer."""

    mtbf_s: float
    restart_s: float
    slowdown: float = 1.0


def _loss(assembly: Assembly, failures: Failures, stored_s: float, mtbf_s: float) -> _Loss:
    """What a failure costs under the chosen recovery."""
    again_s = failures.detect_s + failures.restart_s + stored_s
    if failures.recovery == "restart":
        return _Loss(mtbf_s, again_s + failures.replace_s)
    plan = assembly.plan
    out = float(out_share(failures.device_mtbf_s, failures.replace_s))
    if failures.recovery == "elastic":
        replicas = plan.mesh["dp"]
        formed = whole_replicas(replicas, plan.devices // replicas, out)
        if formed * replicas < 1.0:
            raise _cannot(f"{failures.recovery}: on average {formed * replicas:.2g} replicas can be formed")
        back = float(
            useful_share(failures.restart_s + stored_s if out else 0.0, mtbf_s)
        )  # a device comes back
        return _Loss(mtbf_s, again_s, 1.0 / (formed * back))
    step_s = plan.estimate.step_time_s
    extra_s, shadow_s = _redundant_s(assembly)
    shadowed = -np.expm1(plan.devices * np.log1p(-out)) if out else 0.0
    rate = 1.0 - shadowed + shadowed * step_s / (step_s + shadow_s)
    pause = float(useful_share(failures.detect_s, mtbf_s))
    away_s = max(failures.replace_s, failures.detect_s)
    adjacent_s = float(adjacent_mtbf_s(failures.device_mtbf_s, plan.devices, away_s))
    return _Loss(
        max(adjacent_s, mtbf_s), again_s + failures.replace_s, (1.0 + extra_s / step_s) / float(rate * pause)
    )


def _redundant_s(assembly: Assembly) -> tuple[float, float]:
    """Seconds by which a step is longer as devices run the forward of a neighbour's stage too, and where one runs it all.

    The forward of another stage fills the bubble first.

    Raises:
        InvalidPlan: there is no pipeline, or no memory for a second stage's weights.
    """
    plan, layout = assembly.plan, assembly.layout
    if plan.mesh["pp"] < 2:
        raise _cannot("redundant: no neighbour holds another stage (pp = 1)")
    memory = plan.estimate.memory_bytes
    needed = memory["peak"] + memory.get("parameters", 0.0)
    if needed > plan.estimate.memory_budget_bytes:
        room = format_bytes(plan.estimate.memory_budget_bytes)
        raise _cannot(f"redundant: with weights of a second stage {format_bytes(needed)}, more than {room}")
    forward, backward, _ = phase_seconds(assembly.table)
    each = assembly.micro_batches / layout.copies
    ahead, back = (
        max(float(counts @ seconds[:, 0]) for counts in layout.device_counts) * each
        for seconds in (forward, backward)
    )
    bubble_s = plan.estimate.breakdown_s.get("pipeline_bubble", 0.0)
    return max(ahead - bubble_s, 0.0), back


def _cannot(found: str) -> InvalidPlan:
    return InvalidPlan([Problem("--recovery", found, f"another one of {', '.join(RECOVERIES)}")])


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


def _lost(interval_s: float, stall_s: float, rolled_back: float, slowdown: float) -> Mapping[str, float]:
    """Fractions of the run's time: checkpoints, failures with the work that they undo, and devices that are away or do more."""
    checkpoints = stall_s / interval_s / slowdown
    away = 1.0 - rolled_back / slowdown
    return {
        "checkpoints": checkpoints,
        "failures": 1.0 - 1.0 / slowdown - checkpoints - away,
        "devices_away": away,
    }


def show_goodput(assembly: Assembly, content: Mapping[str, Any]) -> None:
    """Prints it."""
    from planner.report.terminal import Screen

    screen, plan = Screen(), assembly.plan
    lost = content["lost"]
    screen.line(f"{plan.model} on {plan.cluster}: goodput {_nearly_all(content['goodput'])}", "bold")
    away = f" and {lost['devices_away']:.2%} to devices that are away" if lost["devices_away"] > 0.0 else ""
    screen.line(
        f"step {format_seconds(plan.estimate.step_time_s)}, {format_seconds(content['expected_step_s'])} with failures; "
        f"lost {lost['checkpoints']:.2%} to checkpoints, {lost['failures']:.2%} to failures{away}"
    )
    rows = [
        ("a failure every", format_seconds(content["mtbf_s"])),
        ("a restart costs", format_seconds(content["restart_s"])),
        ("  restarts every", format_seconds(content["restarts_every_s"])),
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
        price = "" if run["usd"] is None else f", ${format_count(run['usd'])}"
        text = (
            f"{format_seconds(run['run_s'])} with {_failures(run['failures'])}, {format_count(run['device_hours'])} "
            f"device hours, {energy_text(run)}"
        )
        screen.section("The run", [text + price])
    told = [
        f"{name} ({RECOVERIES[name]}): {_nearly_all(value)}" if isinstance(value, float) else value
        for name, value in content.get("other_recoveries", {}).items()
    ]
    screen.section(
        f"Goodput otherwise (here: {content['recovery']}, {RECOVERIES[content['recovery']]})", told
    )
    defaults = (
        ("mean time between failures", DEVICE_MTBF_S),
        ("store", STORE_BYTES_PER_S),
        ("detection", DETECT_S),
        ("restart", RESTART_S),
    )
    screen.section("Rests on (unless given)", [f"{name}: {x.kind}, {x.source}" for name, x in defaults])


def _nearly_all(share: float) -> str:
    """A share with the decimals that keep it from reading 100 %.

    >>> _nearly_all(0.912), _nearly_all(0.99984)
    ('91.2%', '99.98%')
    """
    texts = (f"{share:.{decimals}%}" for decimals in (1, 2, 3, 4))
    return next((text for text in texts if not text.startswith("100")), "100%")


def _failures(expected: float) -> str:
    told = f"{expected:,.0f}"
    return f"{told} failure{'s' * (told != '1')}"
