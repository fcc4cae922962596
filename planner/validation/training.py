"""Training rows scored: each row's run is priced by the planner's own estimate, and held against what the row measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from planner.assemble import Assembly
from planner.errors import PlannerError
from planner.plan import Estimate, Plan
from planner.solve.named import examine
from planner.uncertainty.judgement import time_group
from planner.uncertainty.residuals import PROCESS, Residuals, load_residuals
from planner.validation.cells import WHERE_SILENT
from planner.validation.exclusions import Exclusion
from planner.validation.measured import asks_for, out_of_memory, peak_memory_bytes, tokens_per_s_per_device
from planner.validation.plans import Run, run_of
from planner.validation.ranking import Comparison
from planner.validation.scores import ScoredRow
from planner.validation.table import Row, Table, Unsupported

__all__ = ["MEMORY_KINDS", "Priced", "TrainingScores", "counted", "predicted_run", "score_training"]

_OUTSIDE_ALLOCATOR = ("framework", "communicators")
MEMORY_KINDS: Mapping[str, tuple[str, ...]] = {
    "allocated": (*_OUTSIDE_ALLOCATOR, "fragmentation"),
    "reserved": _OUTSIDE_ALLOCATOR,
    "smi": (),
    "": (),
}
"""What a measured peak leaves out of a process's memory, by kind: PyTorch's allocator knows of nothing outside it."""

_SOUND = Exclusion("", ("",))
_SWEEP = (
    "sweep_id", "n_devices", "accelerator", "model", "n_layers", "hidden", "seq_len", "global_batch", "dtype",
    "framework_version",
)  # fmt: skip
_GROUPS = ("family", "accelerator", "model", "framework", "peak_memory_kind")


@dataclass(frozen=True, slots=True)
class Priced:
    """A run that could be priced.

    Attributes:
        run: what it was.
        assembly: its plan, with every item.
        scores: how it scored, by metric.
        sweep: what runs that it may be ranked with have in common; None where there are none.
    """

    run: Run
    assembly: Assembly
    scores: Mapping[str, ScoredRow]
    sweep: tuple[str, ...] | None = None


@dataclass(slots=True)
class TrainingScores:
    """What the rows of one file came to.

    Attributes:
        rows: one entry per row and metric that it asks for; one ``skipped`` entry for a row that asks for none.
        runs: runs that may be ranked.
        defaults: by column, how many rows took its default.
        priced: every run that could be priced.
    """

    rows: list[ScoredRow] = field(default_factory=list)
    runs: list[Comparison] = field(default_factory=list)
    defaults: Counter[str] = field(default_factory=Counter)
    priced: list[Priced] = field(default_factory=list)


def score_training(table: Table, excluded: Mapping[str, Exclusion] | None = None) -> TrainingScores:
    """Scores every row of a training table.

    Args:
        table: the table.
        excluded: rows that contradict themselves at their source, by row id; they are predicted, but not counted.
    """
    scores = TrainingScores()
    for row in table.rows:
        _score(row, scores, (excluded or {}).get(row.row_id, _SOUND))
    return scores


def _score(row: Row, scores: TrainingScores, exclusion: Exclusion) -> None:
    """Adds the row's entries."""
    groups = {name: row.text(name) for name in _GROUPS} | {"source": row.file}
    try:
        metrics = asks_for(row)
    except Unsupported as error:
        scores.rows.append(ScoredRow(row.row_id, row.file, "", "skipped", str(error), groups=groups))
        return
    if not metrics:
        reason = "score_for names no metric"
        scores.rows.append(ScoredRow(row.row_id, row.file, "", "skipped", reason, groups=groups))
        return
    try:
        run = run_of(row)
        predicted = predicted_run(run)[1]
    except Unsupported as error:
        run, reason = None, str(error)
    except PlannerError as error:
        run, reason = None, "; ".join(problem.found for problem in error.problems)
    if run is None:
        scores.rows += [
            ScoredRow(row.row_id, row.file, m, "unsupported", reason, groups=groups) for m in metrics
        ]
        return
    scores.defaults.update(run.defaults)
    held = {
        metric: _held(run, predicted.plan, metric, groups, exclusion.reason(metric)) for metric in metrics
    }
    scores.rows += held.values()
    sweep = None
    if "ranking" in held and row.text("sweep_id"):
        sweep = (row.file, *(row.text(column) for column in _SWEEP))
        scores.runs.append(Comparison(held["ranking"], sweep, run.plan_key))
    scores.priced.append(Priced(run, predicted, held, sweep))


def counted(kind: str) -> str:
    """Whose memory a measured peak of a kind counts: the allocator's, or the whole process's."""
    return "allocator" if MEMORY_KINDS[kind] else PROCESS


def predicted_run(run: Run) -> tuple[Run, Assembly]:
    """The run and its plan, priced. Where the row is silent about recompute, the first of :data:`WHERE_SILENT` that fits.

    Raises:
        PlannerError: the problem cannot be priced.
    """
    first = examine(run.problem)
    if first.plan.estimate.fits or "recompute" not in run.defaults:
        return run, first
    for choice in WHERE_SILENT[1:]:
        other = replace(run.problem, fixed={**run.problem.fixed, "recompute": choice})
        assembly = examine(other)
        if assembly.plan.estimate.fits:
            return replace(run, problem=other), assembly
    return run, first


def _held(run: Run, predicted: Plan, metric: str, groups: Mapping[str, str], contradiction: str) -> ScoredRow:
    """One metric of a run that could be priced."""
    row = run.row
    try:
        measured, value = _METRICS[metric](run, predicted.estimate)
    except Unsupported as error:
        return ScoredRow(row.row_id, row.file, metric, "unsupported", str(error), groups=groups)
    status = "excluded" if contradiction else "scored"
    interval = _interval(run, predicted, metric, value)
    return ScoredRow(row.row_id, row.file, metric, status, contradiction, measured, value, groups, interval)


def _interval(run: Run, plan: Plan, metric: str, predicted: float) -> tuple[float, float] | None:
    """What should hold 80 % of measurements of this metric."""
    residuals: Residuals | None = load_residuals()
    if residuals is None or predicted <= 0.0:
        return None
    if metric == "tokens_per_s_per_device":  # the longest step is the lowest rate
        spread = residuals.step_time.of(*time_group(run.problem, plan.mesh))
        high, low = (predicted * predicted / rate for rate in spread.interval(predicted))
        return low, high
    if metric == "peak_memory":
        whose = counted(run.row.text("peak_memory_kind"))
        return residuals.peak.of(run.problem.stack.name, whose).interval(predicted)
    return None


def _rate(run: Run, predicted: Estimate) -> tuple[float, float]:
    problem = run.problem
    device, dtype = problem.cluster.device, str(problem.fixed["precision"])
    dtype = {"fp8_rowwise": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}.get(dtype, dtype)
    measured = tokens_per_s_per_device(
        run.row, problem.model, problem.workload, problem.cluster.devices, device, dtype
    )
    return measured, predicted.tokens_per_s_per_device


def _memory(run: Run, predicted: Estimate) -> tuple[float, float]:
    kind = run.row.text("peak_memory_kind")
    if kind not in MEMORY_KINDS:
        raise Unsupported(f"peak_memory_kind is {kind!r}, none of {', '.join(filter(None, MEMORY_KINDS))}")
    pools = predicted.memory_bytes
    outside = sum(pools.get(pool, 0.0) for pool in MEMORY_KINDS[kind])
    cached = 0.0 if kind == "allocated" else predicted.cached_bytes
    return peak_memory_bytes(run.row), pools["peak"] - outside + cached


def _outcome(run: Run, predicted: Estimate) -> tuple[float, float]:
    return float(out_of_memory(run.row)), float(not predicted.fits)


_METRICS: Mapping[str, Callable[[Run, Estimate], tuple[float, float]]] = {
    "tokens_per_s_per_device": _rate,
    "peak_memory": _memory,
    "oom": _outcome,
    "ranking": _rate,
}
