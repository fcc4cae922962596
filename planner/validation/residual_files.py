"""Writes what the shipped intervals rest on: the table of published runs, and the spreads that are fitted to it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import exp, hypot, isfinite, log, log1p
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from planner.errors import Problem, SpecError
from planner.specs.reader import read_file
from planner.uncertainty.constants import constant_shares, share_of_software
from planner.uncertainty.nearest import far_of, far_without_source
from planner.uncertainty.published import (
    PublishedRun,
    active_parameters,
    rounded,
    shares_as_text,
    shares_of,
    write_published_runs,
)
from planner.uncertainty.residuals import QUANTITIES, Residuals, Spreads
from planner.uncertainty.terms import OUTSIDE, peak_parts, time_shares
from planner.validation.pairs import PairNoise, RankedRun, pair_noise_of
from planner.validation.peak_fit import Outcome
from planner.validation.report import Report
from planner.validation.spreads import Coverage, Residual, fit_spreads, left_out
from planner.validation.term_fit import fit_terms
from planner.validation.training import COUNTED, Priced, memory_reading

__all__ = [
    "LeftOut", "memory_outcomes", "peak_residuals", "published_runs", "read_left_out", "time_residuals", "write_residuals",
]  # fmt: skip

_RATE, _PEAK, _OUTCOME = "tokens_per_s_per_device", "peak_memory", "oom"
_FOLDS = {"model": "model left out", "source": "source left out"}
_VERSION = re.compile(r"^(\S+/\S+).*?@ ?(\w+)|^(.*?arXiv:\S+)")


class LeftOut(NamedTuple):
    """What fits without a row's model, or its source, predict of it.

    Attributes:
        errors: by ``model`` or ``source``: log(predicted/measured) of step times by row.
    """

    errors: Mapping[str, Mapping[str, float]] = MappingProxyType({})


def write_residuals(folder: str | Path, report: Report, refitted: LeftOut) -> dict[str, list[Coverage]]:
    """Writes ``published_runs.csv`` and ``residuals.json`` into a folder.

    Args:
        folder: where to write; it is there already.
        report: scores of training tables.
        refitted: errors with constants fitted without a row's model or source (:func:`read_left_out`); a row that is not there
            counts with its error under the shipped constants.

    Returns:
        By quantity, how intervals do on runs left out.

    Raises:
        SpecError: too few runs were scored for time or memory, or the folder cannot be written.
    """
    runs = rounded(published_runs(report.priced, refitted))
    times, peaks, outcomes = time_residuals(runs), peak_residuals(runs), memory_outcomes(runs)
    for what, residuals in (("time", times), ("memory", peaks)):
        if len({(r.source, r.model) for r in residuals}) < 2:
            found = f"{len(residuals)} runs scored for {what}"
            raise SpecError(Problem("--residuals", found, "runs of at least two models"))
    noise = pair_noise_of(_ranked(report.priced))
    peak = fit_spreads(peaks, outcomes)._replace(terms=_peak_terms(report.priced, runs))
    fitted = Residuals(fit_spreads(times), peak, noise.distances, noise.noises)
    folder = Path(folder)
    try:
        write_published_runs(folder / "published_runs.csv", runs)
        text = json.dumps(_document(fitted, noise, _origins(report.priced)), indent=1, ensure_ascii=False)
        (folder / "residuals.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpecError(Problem(f"--residuals {folder}", f"cannot be written ({error.strerror})")) from None
    return {
        name: [left_out(residuals, by, those).coverage() for by in _FOLDS]
        for name, residuals, those in ((_RATE, times, None), (_PEAK, peaks, outcomes))
    }


def read_left_out(path: str | Path | None) -> LeftOut:
    """What ``benchmarks/fit_stacks.py --json`` wrote; nothing without a path.

    Raises:
        SpecError: the file is missing or wrong.
    """
    if path is None:
        return LeftOut()
    table = read_file(path)
    if not all(isinstance(table.get(name), dict) for name in _FOLDS.values()):
        expected = f"{', '.join(_FOLDS.values())}, as fit_stacks.py writes them"
        raise SpecError(Problem(str(path), f"has {', '.join(table) or 'nothing'}", expected))
    return LeftOut(
        {by: {str(row): float(x) for row, x in table[name].items()} for by, name in _FOLDS.items()}
    )


def published_runs(priced: Iterable[Priced], refitted: LeftOut) -> list[PublishedRun]:
    """Runs whose time or memory was scored, with their errors, and those that say whether they ran out of memory."""
    runs = []
    for one in priced:
        rate, peak = (_scored(one, metric) for metric in (_RATE, _PEAK))
        outcome = one.scores.get(_OUTCOME)
        ran_out = None if outcome is None or outcome.status != "scored" else bool(outcome.measured)
        if rate is None and peak is None and ran_out is None:
            continue
        row, problem = one.run.row, one.run.problem
        plan, device = one.assembly.plan, one.run.problem.cluster.device
        error = None if rate is None else rate[1] / rate[0] - 1.0
        without = {
            by: exp(refitted.errors[by][row.row_id]) ** -1.0 - 1.0
            if row.row_id in refitted.errors.get(by, {})
            else error
            for by in _FOLDS
        }
        stack = problem.stack.on_generation(device.generation)
        shares, step = constant_shares(one.assembly.spends, stack), plan.estimate
        parts = time_shares(step.step_time_s, step.breakdown_s, one.assembly.spends, float(stack.dispatch_s))
        fullest = one.assembly.device_memory[one.assembly.fullest]
        memory_bytes = step.memory_budget_bytes / (1.0 - problem.reserve)
        reading = memory_reading(one.assembly, row.text("peak_memory_kind")) if peak else None
        runs.append(
            PublishedRun(
                row_id=row.row_id, source=row.file, model=row.text("model"),
                stack=problem.stack.name, accelerator=device.name, generation=device.generation, devices=plan.devices,
                active_parameters=active_parameters(problem.model),
                experts=any(block.moe for block in problem.model.blocks.values()),
                state_space=any(block.ssm for block in problem.model.blocks.values()),
                seq_len=problem.workload.seq_len, global_batch_size=problem.workload.global_batch_size,
                precision=str(plan.knobs["precision"]), **{name: plan.mesh[name] for name in ("tp", "cp", "pp", "ep")},
                tokens_per_s_per_device=None if rate is None else rate[0], error=error,
                error_without_model=None if rate is None else without["model"],
                error_without_source=None if rate is None else without["source"],
                parts="" if rate is None else shares_as_text(parts),
                constants_share=None if rate is None else hypot(*shares.values()),
                peak_bytes=None if peak is None else peak[0],
                peak_counts="" if peak is None else row.text("peak_memory_kind"),
                peak_error=None if peak is None else peak[1] / peak[0] - 1.0,
                peak_uncertain=None if reading is None else reading.uncertain, ran_out=ran_out,
                filled=None if ran_out is None else sum(fullest.values()) / memory_bytes,
                filled_uncertain=None if ran_out is None else share_of_software(fullest),
            )
        )  # fmt: skip
    return runs


def time_residuals(runs: Iterable[PublishedRun]) -> list[Residual]:
    """log(measured/predicted) of step times; the error is of the rate, which is the other way round."""
    runs = list(runs)
    return [
        Residual(
            run.source, run.model, run.stack, run.generation, log1p(without_model), log1p(without_source), shares_of(run.parts),
            run.constants_share or 0.0, run.experts, far, elsewhere, run.held_out,
        )
        for run, far, elsewhere in zip(runs, far_of(runs), far_without_source(runs), strict=True)
        if (without_model := run.error_without_model) is not None
        and (without_source := run.error_without_source) is not None
    ]  # fmt: skip


def peak_residuals(runs: Iterable[PublishedRun]) -> list[Residual]:
    """log(measured/predicted) of peak memory; its constants are not fitted to runs one by one."""
    found = []
    for run in runs:
        if run.peak_error is None:
            continue
        counted, error = run.peak_counts in COUNTED, -log1p(run.peak_error)
        software = 0.0 if counted else run.peak_uncertain or 0.0
        found.append(
            Residual(
                run.source, run.model, run.stack, run.generation, error, error, held_out=run.held_out, software=software,
                counted=counted,
            )
        )  # fmt: skip
    return found


def memory_outcomes(runs: Iterable[PublishedRun]) -> list[Outcome]:
    """Runs that say whether they ran out of memory; those whose peak was read say more by that."""
    return [
        Outcome(run.source, run.model, run.filled, run.filled_uncertain or 0.0, bool(run.ran_out))
        for run in runs
        if run.filled is not None and run.peak_error is None
    ]


# -- details ---------------------------------------------------------------------------------------------------------


def _scored(one: Priced, metric: str) -> tuple[float, float] | None:
    """Measured and predicted value, where the row counts."""
    score = one.scores.get(metric)
    if score is None or score.status != "scored" or not score.measured or not score.predicted:
        return None
    return score.measured, score.predicted


def _origins(priced: Iterable[Priced]) -> dict[str, list[str]]:
    """Documents behind each file."""
    found: dict[str, dict[str, None]] = {}
    for one in priced:
        row = one.run.row
        found.setdefault(row.file, {})[_origin(row.text("source"))] = None
    return {file: sorted(origins) for file, origins in found.items()}


def _origin(text: str) -> str:
    """Document and version of a row's source, without the place inside it."""
    found = _VERSION.match(text)
    if found is None:
        return text.partition(",")[0]
    return found[3] or f"{found[1]}@{found[2]}"


def _ranked(priced: Iterable[Priced]) -> list[RankedRun]:
    found = []
    for one in priced:
        score = _scored(one, "ranking")
        comparison = one.sweep
        if score is not None and comparison is not None:
            found.append(RankedRun(comparison, one.assembly.plan.estimate, log(score[0] / score[1])))
    return found


def _peak_terms(priced: Sequence[Priced], runs: Sequence[PublishedRun]) -> dict[str, float]:
    """Deviation of every term of the peak; models weigh the same however many runs they have."""
    by_row = {run.row_id: run for run in runs if run.peak_error is not None}
    count = Counter((run.source, run.model) for run in by_row.values())
    shares: list[Mapping[str, float]] = []
    errors, weights = [], []
    for one in priced:
        run = by_row.get(one.run.row.row_id)
        if run is None or run.peak_error is None:
            continue
        held = peak_parts(memory_reading(one.assembly, run.peak_counts).pools)
        shares.append({name: part / held[OUTSIDE] for name, part in held.items()})
        errors.append(-log1p(run.peak_error))
        weights.append(1.0 / count[run.source, run.model])
    return fit_terms(shares, errors, weights)


_ABOUT = (
    "What published runs measured, relative to what was predicted of them: planner validate --residuals writes this file. "
    "quantiles: of log(measured/predicted) over how uncertain the prediction was, at probabilities 0.05 0.1 0.25 0.5 0.75 0.9 "
    "0.95, fitted to published_runs.csv by planner/validation/spreads.py; floor: the least that a prediction is uncertain by; "
    "between: how uncertain constants of software that was never measured are, far: a job that no measured run is near, experts: "
    "a mixture of experts that none is near, process: what a process takes beside what is counted of it, as logarithms; "
    "tail: the power with which the chance of more falls beyond the outermost quantiles; "
    "terms: standard deviation of each term's logarithm. "
    "pairs: log ratio of two predicted steps below which their order is noise, by how unlike the plans are. "
    "sources: documents and versions of the files' rows."
)


_SOME = ("between", "far", "experts", "process")


def _document(residuals: Residuals, noise: PairNoise, origins: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    spreads = zip(QUANTITIES, (residuals.step_time, residuals.peak), strict=True)
    return {
        "about": _ABOUT,
        **{quantity: _spreads_json(one) for quantity, one in spreads},
        "pairs": {
            "rows": noise.rows, "sweeps": noise.sweeps, "distances": _rounded(noise.distances), "noises": _rounded(noise.noises),
        },
        "sources": dict(sorted(origins.items())),
    }  # fmt: skip


def _spreads_json(spreads: Spreads) -> dict[str, Any]:
    return {
        "rows": spreads.rows,
        "models": spreads.models,
        "sources": list(spreads.sources),
        "measured": [" on ".join(pair) for pair in sorted(spreads.measured)],
        "floor": round(spreads.floor, 4),
        **{name: round(value, 4) for name in _SOME if (value := getattr(spreads, name))},
        **({"tail": round(spreads.tail, 4)} if isfinite(spreads.tail) else {}),
        "quantiles": _rounded(spreads.quantiles),
        "terms": dict(zip(spreads.terms, _rounded(spreads.terms.values()), strict=True)),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]
