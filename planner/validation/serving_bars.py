"""What serving rows are held to: errors are comparable within a metric, a kind of model and a way to drive the engine."""

from __future__ import annotations

from planner.uncertainty.serving import QUANTITIES, kind_of
from planner.validation.serving_runs import ServedRun

__all__ = ["QUANTITY_OF", "bar_of", "kind_of_run", "kind_of_value", "load_of_run"]

_TPOT, _TTFT, _RATE = QUANTITIES
QUANTITY_OF = {"tpot": _TPOT, "ttft": _TTFT, "output_tokens_per_s": _RATE, "latency": _RATE}
"""What of an estimate a metric is; a batch's latency is its rate, the other way round."""


def kind_of_run(run: ServedRun) -> str:
    """Runs whose errors are alike."""
    return kind_of(experts=run.experts, pools=run.driver == "pools")


def kind_of_value(run: ServedRun, metric: str) -> str:
    """Values whose errors are alike: rates of pools, of which few were published, are like others of such models."""
    return kind_of(experts=run.experts, pools=run.driver == "pools" and QUANTITY_OF[metric] != _RATE)


def load_of_run(run: ServedRun) -> str:
    """How its requests came (:data:`~planner.uncertainty.serving.LOADS`)."""
    return "open" if run.driver in ("rate", "burst", "offline") else "closed"


def bar_of(run: ServedRun, metric: str) -> str:
    """The name of the set of rows that a row's metric is scored in."""
    told_by_kind = metric == "tpot" or run.driver == "pools"
    return f"{metric}, {kind_of_run(run) if told_by_kind else run.driver}"
