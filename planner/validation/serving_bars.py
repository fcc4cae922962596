"""What serving rows are held to: errors are comparable within a metric, a kind of model and a way to drive the engine."""

from __future__ import annotations

from planner.validation.serving_runs import ServedRun

__all__ = ["bar_of"]


def bar_of(run: ServedRun, metric: str) -> str:
    """The name of the set of rows that a row's metric is scored in."""
    experts = any(block.moe is not None for block in run.model.blocks.values())
    kind = "with experts" if experts else "dense"
    if run.driver == "pools":
        return f"{metric}, pools"
    if metric == "tpot":
        return f"tpot, {kind}"
    return f"{metric}, {run.driver}"
