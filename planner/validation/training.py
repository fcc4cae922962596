"""Training rows scored: each row's run is priced by the planner's own estimate, and held against what the row measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from planner.errors import PlannerError
from planner.plans.assemble import Assembly
from planner.solve.named import examine
from planner.uncertainty.constants import share_of_software
from planner.uncertainty.judgement import time_spread
from planner.uncertainty.residuals import Residuals, load_residuals
from planner.validation.exclusions import Exclusion
from planner.validation.measured import asks_for, out_of_memory, peak_memory_bytes, tokens_per_s_per_device
from planner.validation.plans import Run, run_of
from planner.validation.ranking import Comparison
from planner.validation.scores import ScoredRow
from planner.validation.table import Row, Table, Unsupported

__all__ = [
    "COUNTED", "MEMORY_KINDS", "Priced", "Reading", "TrainingScores", "memory_reading", "predicted_run", "score_training",
]  # fmt: skip

_OUTSIDE_ALLOCATOR = ("framework", "communicators")
MEMORY_KINDS: Mapping[str, tuple[str, ...]] = {
    "allocated": (*_OUTSIDE_ALLOCATOR, "fragmentation"),
    "reserved": _OUTSIDE_ALLOCATOR,
    "smi": (),
    "": (),
}
"""What a measured peak leaves out of a process's memory, by kind: PyTorch's allocator knows of nothing outside it."""

COUNTED = ("allocated",)
"""Kinds of which every byte is one that the ledger counts; what the allocator and the process take beside them is not in them."""

_SOUND = Exclusion("", ("",))
_SWEEP = (
    "sweep_id", "n_devices", "accelerator", "model", "n_layers", "hidden", "ffn_hidden", "n_heads", "n_kv_heads", "vocab",
    "n_experts", "top_k", "expert_ffn_hidden", "seq_len", "global_batch", "dtype", "framework_version",
)  # fmt: skip
"""What plans are ranked at equal values of: a table may vary a model's heads beside its plan, under one name."""

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
    held = {metric: _held(run, predicted, metric, groups, exclusion.reason(metric)) for metric in metrics}
    scores.rows += held.values()
    sweep = None
    if "ranking" in held and row.text("sweep_id"):
        sweep = (row.file, *(row.text(column) for column in _SWEEP))
        scores.runs.append(Comparison(held["ranking"], sweep, run.plan_key))
    scores.priced.append(Priced(run, predicted, held, sweep))


class Reading(NamedTuple):
    """What a meter is predicted to show: bytes by pool, and freed bytes that the allocator keeps."""

    pools: Mapping[str, float]
    cached_bytes: float

    @property
    def n_bytes(self) -> float:
        """All of it."""
        return sum(self.pools.values()) + self.cached_bytes

    @property
    def uncertain(self) -> float:
        """What its interval grows with."""
        return share_of_software(self.pools, self.cached_bytes)


def memory_reading(assembly: Assembly, kind: str) -> Reading:
    """What a peak of some kind is predicted to be.

    PyTorch's counters are of the fullest rank. ``nvidia-smi`` shows devices that somebody looked at: BLOOM's chronicle those of
    the first and the last node, of which the first hold more; and a table of pipelines on V100 the first, for it reads 15 GB of
    a run whose twice as large micro-batch ran out of 32 GB, which the logits on the last device explain.
    """
    outside, estimate = MEMORY_KINDS[kind], assembly.plan.estimate
    pools, cached = assembly.device_memory[assembly.fullest], estimate.cached_bytes
    if kind == "smi":
        pools, cached = assembly.device_memory[0], assembly.device_cached[0]
    counted = {pool: held for pool, held in pools.items() if pool not in outside}
    return Reading(counted, 0.0 if kind == "allocated" else cached)


def predicted_run(run: Run) -> tuple[Run, Assembly]:
    """The run and its plan, priced. Where the row leaves recompute open, the least that fits in memory.

    Raises:
        PlannerError: the problem cannot be priced.
    """
    first = examine(run.problem)
    if first.plan.estimate.fits:
        return run, first
    for knobs in run.otherwise:
        kept = {k: v for k, v in run.problem.fixed.items() if not k.startswith("recompute")}
        other = replace(run.problem, fixed={**kept, **knobs})
        assembly = examine(other)
        if assembly.plan.estimate.fits:
            return replace(run, problem=other), assembly
    return run, first


def _held(
    run: Run, predicted: Assembly, metric: str, groups: Mapping[str, str], contradiction: str
) -> ScoredRow:
    """One metric of a run that could be priced."""
    row = run.row
    try:
        measured, value = _METRICS[metric](run, predicted)
    except Unsupported as error:
        return ScoredRow(row.row_id, row.file, metric, "unsupported", str(error), groups=groups)
    status = "excluded" if contradiction else "scored"
    interval = _interval(run, predicted, metric, value)
    return ScoredRow(row.row_id, row.file, metric, status, contradiction, measured, value, groups, interval)


def _interval(run: Run, assembly: Assembly, metric: str, predicted: float) -> tuple[float, float] | None:
    """What should hold 80 % of measurements of this metric."""
    residuals: Residuals | None = load_residuals()
    if residuals is None or predicted <= 0.0:
        return None
    if metric == "tokens_per_s_per_device":  # the longest step is the lowest rate
        step = assembly.plan.estimate
        spread = time_spread(residuals, run.problem, step.step_time_s, step.breakdown_s, assembly.spends)
        high, low = (predicted * predicted / rate for rate in spread.interval(predicted))
        return low, high
    if metric == "peak_memory":
        kind = run.row.text("peak_memory_kind")
        reading = memory_reading(assembly, kind)
        counted = kind in COUNTED
        return residuals.peak.at(0.0 if counted else reading.uncertain, counted=counted).interval(predicted)
    return None


def _rate(run: Run, predicted: Assembly) -> tuple[float, float]:
    problem = run.problem
    device, dtype = problem.cluster.device, str(problem.fixed["precision"])
    dtype = {"fp8_rowwise": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}.get(dtype, dtype)
    measured = tokens_per_s_per_device(
        run.row, problem.model, problem.workload, problem.cluster.devices, device, dtype
    )
    return measured, predicted.plan.estimate.tokens_per_s_per_device


def _memory(run: Run, predicted: Assembly) -> tuple[float, float]:
    kind = run.row.text("peak_memory_kind")
    if kind not in MEMORY_KINDS:
        raise Unsupported(f"peak_memory_kind is {kind!r}, none of {', '.join(filter(None, MEMORY_KINDS))}")
    return peak_memory_bytes(run.row), memory_reading(predicted, kind).n_bytes


def _outcome(run: Run, predicted: Assembly) -> tuple[float, float]:
    return float(out_of_memory(run.row)), float(not predicted.plan.estimate.fits)


_METRICS: Mapping[str, Callable[[Run, Assembly], tuple[float, float]]] = {
    "tokens_per_s_per_device": _rate,
    "peak_memory": _memory,
    "oom": _outcome,
    "ranking": _rate,
}
