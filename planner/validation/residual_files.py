"""Writes what the shipped intervals rest on: the table of published runs, and the spreads that are fitted to it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import exp, hypot, log, log1p
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from planner.errors import Problem, SpecError
from planner.specs.reader import read_file
from planner.uncertainty.constants import constant_shares, constants_spread
from planner.uncertainty.nearest import far_of
from planner.uncertainty.published import PublishedRun, active_parameters, write_published_runs
from planner.uncertainty.residuals import QUANTITIES, Residuals, Spreads
from planner.uncertainty.terms import peak_parts, time_parts
from planner.validation.pairs import PairNoise, RankedRun, pair_noise_of
from planner.validation.report import Report
from planner.validation.spreads import Coverage, Residual, fit_spreads, left_out
from planner.validation.term_fit import fit_terms
from planner.validation.training import COUNTED, Priced, memory_reading

__all__ = [
    "LeftOut", "peak_residuals", "published_runs", "read_left_out", "time_residuals", "write_residuals",
]  # fmt: skip

_RATE, _PEAK = "tokens_per_s_per_device", "peak_memory"
_FOLDS = {"model": "model left out", "source": "source left out"}
_VERSION = re.compile(r"^(\S+/\S+).*?@ ?(\w+)|^(.*?arXiv:\S+)")


class LeftOut(NamedTuple):
    """What fits without a row's model, or its source, predict of it.

    Attributes:
        errors: by ``model`` or ``source``: log(predicted/measured) of step times by row.
        spreads: by the same, how uncertain those constants left the step, as a logarithm.
    """

    errors: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    spreads: Mapping[str, Mapping[str, float]] = MappingProxyType({})


def write_residuals(folder: str | Path, report: Report, refitted: LeftOut) -> dict[str, list[Coverage]]:
    """Writes ``published_runs.csv`` and ``residuals.json`` into a folder.

    Args:
        folder: where to write; it is there already.
        report: scores of training tables.
        refitted: errors with constants fitted without a row's model or source (:func:`read_left_out`); a row that is not there
            counts with its error and its spread under the shipped constants.

    Returns:
        By quantity, how intervals do on runs left out.

    Raises:
        SpecError: too few runs were scored for time or memory, or the folder cannot be written.
    """
    runs = published_runs(report.priced, refitted)
    times, peaks = time_residuals(runs), peak_residuals(runs)
    for what, residuals in (("time", times), ("memory", peaks)):
        if len({(r.source, r.model) for r in residuals}) < 2:
            found = f"{len(residuals)} runs scored for {what}"
            raise SpecError(Problem("--residuals", found, "runs of at least two models"))
    noise = pair_noise_of(_ranked(report.priced))
    fitted = Residuals(
        fit_spreads(times), fit_spreads(peaks), noise.distances, noise.noises, _terms(report.priced, runs)
    )
    folder = Path(folder)
    try:
        write_published_runs(folder / "published_runs.csv", runs)
        text = json.dumps(_document(fitted, noise, _origins(report.priced)), indent=1, ensure_ascii=False)
        (folder / "residuals.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpecError(Problem(f"--residuals {folder}", f"cannot be written ({error.strerror})")) from None
    return {
        name: [left_out(residuals, by) for by in _FOLDS]
        for name, residuals in ((_RATE, times), (_PEAK, peaks))
    }


def read_left_out(path: str | Path | None) -> LeftOut:
    """What ``benchmarks/fit_stacks.py --json`` wrote; nothing without a path.

    Raises:
        SpecError: the file is missing or wrong.
    """
    if path is None:
        return LeftOut()
    table = read_file(path)
    found = [table, table.get("spread") or {}]
    if not all(isinstance(part.get(name), dict) for part in found for name in _FOLDS.values()):
        expected = f"{', '.join(_FOLDS.values())}, and the same under spread, as fit_stacks.py writes them"
        raise SpecError(Problem(str(path), f"has {', '.join(table) or 'nothing'}", expected))
    errors, spreads = (
        {by: {str(row): float(x) for row, x in part[name].items()} for by, name in _FOLDS.items()}
        for part in found
    )
    return LeftOut(errors, spreads)


def published_runs(priced: Iterable[Priced], refitted: LeftOut) -> list[PublishedRun]:
    """Runs whose time or memory was scored, with their errors."""
    runs = []
    for one in priced:
        rate, peak = (_scored(one, metric) for metric in (_RATE, _PEAK))
        if rate is None and peak is None:
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
        shares = constant_shares(one.assembly.spends, stack)
        shipped = constants_spread(shares, stack)
        uncertain = {by: refitted.spreads.get(by, {}).get(row.row_id, shipped) for by in _FOLDS}
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
                uncertain_without_model=None if rate is None else uncertain["model"],
                uncertain_without_source=None if rate is None else uncertain["source"],
                constants_share=None if rate is None else hypot(*shares.values()),
                peak_bytes=None if peak is None else peak[0],
                peak_counts="" if peak is None else row.text("peak_memory_kind"),
                peak_error=None if peak is None else peak[1] / peak[0] - 1.0,
                peak_uncertain=None if reading is None else reading.uncertain,
            )
        )  # fmt: skip
    return runs


def time_residuals(runs: Iterable[PublishedRun]) -> list[Residual]:
    """log(measured/predicted) of step times; the error is of the rate, which is the other way round."""
    runs = list(runs)
    return [
        Residual(
            run.source, run.model, run.stack, run.generation, log1p(without_model), log1p(without_source),
            run.uncertain_without_model or 0.0, run.uncertain_without_source or 0.0, run.constants_share or 0.0, run.experts,
            far, run.held_out,
        )
        for run, far in zip(runs, far_of(runs), strict=True)
        if (without_model := run.error_without_model) is not None
        and (without_source := run.error_without_source) is not None
    ]  # fmt: skip


def peak_residuals(runs: Iterable[PublishedRun]) -> list[Residual]:
    """log(measured/predicted) of peak memory; its constants are not fitted to runs one by one."""
    runs, found = list(runs), []
    for run, far in zip(runs, far_of(runs), strict=True):
        if run.peak_error is None:
            continue
        counted, error = run.peak_counts in COUNTED, -log1p(run.peak_error)
        uncertain = 0.0 if counted else run.peak_uncertain or 0.0
        found.append(
            Residual(
                run.source, run.model, run.stack, run.generation, error, error, uncertain, uncertain, far=far, counted=counted
            )
        )  # fmt: skip
    return found


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


def _terms(priced: Sequence[Priced], runs: Sequence[PublishedRun]) -> dict[str, dict[str, float]]:
    """Deviation of every term of the step time and of the peak."""
    by_row = {run.row_id: run for run in runs}
    count = Counter((run.source, run.model) for run in runs)
    shares: dict[str, list[Mapping[str, float]]] = {"step_time": [], "peak": []}
    errors: dict[str, list[float]] = {"step_time": [], "peak": []}
    weights: dict[str, list[float]] = {"step_time": [], "peak": []}
    for one in priced:
        run = by_row.get(one.run.row.row_id)
        if run is None:
            continue
        estimate = one.assembly.plan.estimate
        found: dict[str, tuple[Mapping[str, float], float, float]] = {}
        if run.error_without_model is not None:
            dispatch_s = float(one.run.problem.stack.dispatch_s)
            seconds = time_parts(estimate.step_time_s, estimate.breakdown_s, one.assembly.spends, dispatch_s)
            found["step_time"] = seconds, estimate.step_time_s, log1p(run.error_without_model)
        if run.peak_error is not None:
            held = peak_parts(memory_reading(one.assembly, run.peak_counts).pools)
            found["peak"] = held, sum(held.values()) / 2.0, -log1p(run.peak_error)
        for quantity, (parts, whole, error) in found.items():
            shares[quantity].append({name: part / whole for name, part in parts.items()})
            errors[quantity].append(error)
            weights[quantity].append(1.0 / count[run.source, run.model])
    return {quantity: fit_terms(shares[quantity], errors[quantity], weights[quantity]) for quantity in shares}


_ABOUT = (
    "What published runs measured, relative to what was predicted of them: planner validate --residuals writes this file. "
    "quantiles: of log(measured/predicted) over how uncertain the prediction was, at probabilities 0.05 0.1 0.25 0.5 0.75 0.9 "
    "0.95, fitted to published_runs.csv by planner/validation/spreads.py; floor: the least that a prediction is uncertain by; "
    "between: how uncertain constants of software that was never measured are, far: a job that no measured run is near, experts: "
    "a mixture of experts that none is near, as logarithms. "
    "pairs: log ratio of two predicted steps below which their order is noise, by how unlike the "
    "plans are. terms: standard deviation of each term's logarithm. sources: documents and versions of the files' rows."
)


def _document(residuals: Residuals, noise: PairNoise, origins: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    spreads = zip(QUANTITIES, (residuals.step_time, residuals.peak), strict=True)
    return {
        "about": _ABOUT,
        **{quantity: _spreads_json(one) for quantity, one in spreads},
        "pairs": {
            "rows": noise.rows, "sweeps": noise.sweeps, "distances": _rounded(noise.distances), "noises": _rounded(noise.noises),
        },
        "terms": {
            quantity: dict(zip(terms, _rounded(terms.values()), strict=True)) for quantity, terms in residuals.terms.items()
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
        **({"between": round(spreads.between, 4)} if spreads.between else {}),
        **({"far": round(spreads.far, 4)} if spreads.far else {}),
        **({"experts": round(spreads.experts, 4)} if spreads.experts else {}),
        "quantiles": _rounded(spreads.quantiles),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]
