"""Values of serving rows that are predicted and shown, but not counted, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from planner.validation.serving_runs import ServedRun

__all__ = ["contradicted", "excluded", "repeated"]

Measured: TypeAlias = Mapping[str, float]

_APART = 1.25
_CUT_SHORT = 0.9


def _stated(run: ServedRun) -> tuple[object, ...]:
    """All that a row says of its run, and not what the scripts of its day say; models of one shape count as one."""
    said = replace(run, requests_per_client=None, compiles=False)
    return (
        run.model.hidden,
        run.model.n_layers,
        *said.group[1:],
        run.degrees,
        run.load,
        run.workers,
        run.prefill,
    )


def contradicted(runs: Sequence[tuple[ServedRun, Measured]]) -> set[str]:
    """Rows whose stated configuration was measured several times with times between tokens more than 25 % apart.

    Something that they do not state tells them apart: speculation, mostly.
    """
    same: dict[object, list[tuple[str, float]]] = defaultdict(list)
    for run, measured in runs:
        if "tpot" in measured:
            same[_stated(run)].append((run.row.row_id, measured["tpot"]))
    apart = [
        values for values in same.values() if max(t for _, t in values) > _APART * min(t for _, t in values)
    ]
    return {row_id for values in apart for row_id, _ in values}


def repeated(runs: Sequence[tuple[ServedRun, Measured]]) -> dict[str, str]:
    """Rows with the configuration and every measured digit of an earlier one, and that one's name.

    Snapshots of a growing table list a run again, and list it under each of the names that one model has. A second
    measurement would differ in its digits, so at least two values must agree.
    """
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for run, measured in runs:
        if len(measured) < 2 or run.row.text("quality") == "C":
            continue
        key = (_stated(run), tuple(sorted(measured.items())))
        earlier = first.setdefault(key, run.row.row_id)
        if earlier != run.row.row_id:
            found[run.row.row_id] = earlier
    return found


def excluded(run: ServedRun, metric: str, asked: Measured, contradicted: bool, repeated: bool) -> str:
    """Why a value is not counted; empty if it is.

    Args:
        run: the row's run.
        metric: which of its values.
        asked: all of them.
        contradicted: whether the row is one of :func:`contradicted`.
        repeated: whether it is one of :func:`repeated`.
    """
    if run.row.text("quality") == "C":
        return "quality C at its source"
    if metric in ("tpot", "ttft"):
        if run.may_speculate:
            return "whether multi-token prediction was on is not stated, and both were run"
        if contradicted:
            return "repeats of the stated configuration differ: something unstated tells them apart"
    if repeated:
        return "the same measurement as another row, to the last digit: it counts once"
    if metric == "latency" and _ended_early(run, asked):
        return "answers ended before their stated length, by the row's own times"
    return ""


def _ended_early(run: ServedRun, asked: Measured) -> bool:
    """Whether a latency is shorter than the row's own first token and its stated number of further ones take."""
    if not {"latency", "ttft", "tpot"} <= set(asked):
        return False
    stated_s = asked["ttft"] + (run.osl - 1.0) * asked["tpot"]
    return asked["latency"] < _CUT_SHORT * stated_s
