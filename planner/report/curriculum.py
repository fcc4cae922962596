"""A run whose sequences grow: the plan and the time of every phase."""

from __future__ import annotations

from planner.report.terminal import Screen
from planner.solve.curriculum import Curriculum
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.units import format_count, format_seconds

__all__ = ["show_curriculum"]


def show_curriculum(found: Curriculum, model: Model, cluster: Cluster) -> None:
    """Prints it."""
    screen = Screen()
    last = found.phases[-1].seq_len
    screen.line(f"{model.name} on {cluster.name}: {format_seconds(found.run_s)}", "bold")
    screen.line(
        f"with {last:,} tokens throughout {format_seconds(found.at_last_length_s)}, "
        f"{found.at_last_length_s / found.run_s:.2f} times as long"
    )
    screen.line()
    rows = []
    for phase in found.phases:
        plan, mesh = phase.plan, phase.plan.mesh
        degrees = (
            " ".join(f"{name}{mesh[name]}" for name in ("tp", "cp", "pp", "dp", "ep") if mesh[name] > 1)
            or "-"
        )
        rows.append(
            (
                f"{phase.seq_len:,}", format_count(phase.tokens), degrees, str(plan.knobs["recompute"]),
                format_seconds(plan.estimate.step_time_s), f"{plan.estimate.mfu:.1%}", format_seconds(phase.run_s),
                format_seconds(phase.switch_s) if phase.switch_s else "",
            )
        )  # fmt: skip
    headings = ("length", "tokens", "mesh", "recompute", "step", "MFU", "time", "switch before")
    screen.grid(headings, rows, ("mesh", "recompute"))
