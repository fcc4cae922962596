"""Several clusters, or several sizes of one: which is best, and how few devices meet a deadline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isqrt
from time import perf_counter
from typing import Any

import numpy as np

from planner.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.costs.economics import tokens_run_s
from planner.errors import Infeasible, Interrupted, SpecError
from planner.errors import Problem as Fault
from planner.ledger import Matmul
from planner.plan import Plan, SearchReport, SearchResult
from planner.solve.train import search
from planner.specs.cluster_file import load_cluster
from planner.specs.formats import FORMATS
from planner.specs.problem import Problem
from planner.units import format_seconds

__all__ = ["Attempt", "Fleet", "fewest_devices", "objective_value", "resized", "search_clusters", "sizes"]

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One cluster that was tried: its best plan's step and run time, or why there is none."""

    cluster: str
    devices: int
    step_time_s: float | None
    run_s: float | None
    outcome: str

    def as_dict(self) -> dict[str, Any]:
        """The attempt as JSON fields."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Fleet:
    """Ranked plans of all clusters together, and what each cluster came to."""

    result: SearchResult
    attempts: tuple[Attempt, ...]


def objective_value(plan: Plan, objective: str) -> float:
    """What a ranking minimises: seconds, dollars, joules or device hours of one optimizer step."""
    estimate = plan.estimate
    if objective == "usd":
        assert estimate.usd_per_step is not None
        return estimate.usd_per_step
    if objective == "energy":
        return estimate.joules_per_step
    return estimate.step_time_s * (plan.devices / 3600.0 if objective == "gpu_hours" else 1.0)


def search_clusters(
    problems: Sequence[Problem], top: int = 10, on_progress: OnProgress | None = None
) -> Fleet:
    """Searches every cluster and ranks all plans by the objective.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: nothing fits on any cluster.
        Interrupted: the user pressed Ctrl-C; carries what was found so far.
    """
    found: list[SearchResult] = []
    attempts: list[Attempt] = []
    faults: list[Fault] = []
    objective = problems[0].objective
    for problem in problems:
        try:
            found.append(search(problem, top, on_progress))
            attempts.append(_attempt(problem, found[-1].best.estimate.step_time_s, "searched"))
        except Infeasible as error:
            faults += error.problems
            attempts.append(_attempt(problem, None, str(error)))
        except Interrupted as stop:
            found += [stop.best] if isinstance(stop.best, SearchResult) else []
            raise Interrupted(
                Fleet(_merged(found, objective, top), tuple(attempts)) if found else None
            ) from None
    if not found:
        raise Infeasible(faults)
    return Fleet(_merged(found, objective, top), tuple(attempts))


def fewest_devices(
    problems: Iterable[Problem], top: int = 10, on_progress: OnProgress | None = None
) -> Fleet:
    """Plans of the smallest cluster on which the run meets its deadline.

    Clusters are tried by size, ascending; one that would miss the deadline even at peak FLOP rate is not searched.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
        Infeasible: none meets the deadline.
    """
    attempts: list[Attempt] = []
    start = perf_counter()
    ascending = sorted(problems, key=lambda problem: problem.cluster.devices)
    for _, group in groupby(ascending, key=lambda problem: problem.cluster.devices):
        met: list[SearchResult] = []
        for problem in group:
            attempt, result = _try(problem, top, on_progress)
            attempts.append(attempt)
            met += [result] if result is not None else []
        if met:
            merged = _merged(met, ascending[0].objective, top)
            return Fleet(_with_wall(merged, perf_counter() - start), tuple(attempts))
    raise _missed(ascending[0].deadline_s or 0.0, attempts)


def sizes(nodes: int) -> list[int]:
    """Node counts to try up to a given one: its divisors and the powers of two, ascending.

    >>> sizes(12)
    [1, 2, 3, 4, 6, 8, 12]
    """
    low = [n for n in range(1, isqrt(nodes) + 1) if nodes % n == 0]
    return sorted({*low, *(nodes // n for n in low), *(2**k for k in range(nodes.bit_length()))})


def resized(problem: Problem) -> list[Problem]:
    """The problem on every size of its cluster (:func:`sizes`); sizes that the machine cannot be built in are left out.

    Raises:
        SpecError: the cluster has several groups, or comes from a file.
    """
    cluster = problem.cluster
    group = cluster.groups[0]
    name, _, counts = cluster.name.partition(":")
    if len(cluster.groups) > 1 or (not counts and name.endswith(".toml")):
        what = f"{cluster.name} cannot be resized"
        raise SpecError(Fault("--deadline", what, "clusters of the form NAME:NODESxDEVICES_PER_NODE"))
    found = []
    for nodes in sizes(group.nodes):
        spec = f"{name}:{nodes}x{group.devices_per_node}"
        try:
            found.append(replace(problem, cluster=replace(load_cluster(spec), name=spec)))
        except SpecError:
            if nodes == group.nodes:
                raise
    return found


# -- details ---------------------------------------------------------------------------------------------------------


def _try(problem: Problem, top: int, on_progress: OnProgress | None) -> tuple[Attempt, SearchResult | None]:
    """One size under the deadline; the result only if the deadline is met."""
    deadline_s = problem.deadline_s
    assert deadline_s is not None
    floor_s = _floor_step_s(problem)
    if _run_s(problem, floor_s) > deadline_s:
        reason = f"too small: {format_seconds(_run_s(problem, floor_s))} even at peak FLOP rate"
        return _attempt(problem, None, reason), None
    try:
        result = search(problem, top, on_progress)
    except Infeasible as error:
        return _attempt(problem, None, str(error)), None
    step_s = result.best.estimate.step_time_s
    meets = _run_s(problem, step_s) <= deadline_s
    attempt = _attempt(problem, step_s, "meets the deadline" if meets else "too slow")
    return attempt, result if meets else None


def _attempt(problem: Problem, step_s: float | None, outcome: str) -> Attempt:
    run_s = None if step_s is None or problem.workload.tokens is None else _run_s(problem, step_s)
    return Attempt(problem.cluster.name, problem.cluster.devices, step_s, run_s, outcome)


def _run_s(problem: Problem, step_s: float) -> float:
    assert problem.workload.tokens is not None
    return float(tokens_run_s(problem.workload.tokens, problem.workload.tokens_per_step, step_s))


def _floor_step_s(problem: Problem) -> float:
    """No step is faster: the linear layers' FLOP at the highest peak of the allowed formats, on all devices."""
    workload, device = problem.workload, problem.cluster.device
    if workload.capacity_factor is not None and workload.capacity_factor < 1.0:
        return 0.0  # tokens are dropped
    ledger = baseline(
        problem.model, batch=1.0, seq=float(workload.seq_len), encoder_seq=workload.encoder_seq_len
    )
    repeats = Counter([*block_order(problem.model), EMBEDDING, HEAD])
    axes = ledger.axes
    flop = sum(
        repeats[item.block]
        * float(np.ravel(2.0 * axes[item.m] * axes[item.n] * axes[item.k] * axes[item.groups])[0])
        for item in ledger.of(Matmul)
        if "core_attn" not in item.tags
    )
    peak = max(float(rate) for rate in device.peak_flop_per_s.values())
    named = [FORMATS[name].matmul for name in workload.precisions]
    if all(device.supports(dtype) for dtype in named) and "precision" not in problem.fixed:
        peak = max(float(device.peak_flop_per_s[dtype]) for dtype in named)
    return workload.global_batch_size * flop / (problem.cluster.devices * peak)


def _merged(results: Sequence[SearchResult], objective: str, top: int) -> SearchResult:
    """All plans ranked together, and the searches' accounts added up."""
    if len(results) == 1:
        return results[0]
    plans = [plan for result in results for plan in result.plans]
    plans.sort(key=lambda plan: objective_value(plan, objective))
    reports = [result.search for result in results]

    def added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
        total: Counter[str] = Counter()
        for count in counts:
            total.update(count)
        return dict(sorted(total.items()))

    report = SearchReport(
        candidates=sum(r.candidates for r in reports),
        scored=sum(r.scored for r in reports),
        repriced=sum(r.repriced for r in reports),
        excluded_by_bound=added(r.excluded_by_bound for r in reports),
        rejected=added(r.rejected for r in reports),
        wall_s=sum(r.wall_s for r in reports),
    )
    pareto = tuple(point for result in results for point in result.pareto)
    notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
    return SearchResult(tuple(plans[:top]), report, pareto, notes)


def _with_wall(result: SearchResult, wall_s: float) -> SearchResult:
    return replace(result, search=replace(result.search, wall_s=wall_s))


def _missed(deadline_s: float, attempts: Sequence[Attempt]) -> Infeasible:
    """The largest cluster still misses the deadline, or none could be searched."""
    ran = [attempt for attempt in attempts if attempt.run_s is not None]
    if not ran:
        return Infeasible(
            Fault(
                f"{attempt.cluster} ({attempt.devices:,} devices)",
                attempt.outcome,
                "a cluster that meets the deadline",
            )
            for attempt in attempts[-3:]
        )
    best = min(ran, key=lambda attempt: attempt.run_s or 0.0)
    assert best.run_s is not None
    return Infeasible(
        Fault(
            "--deadline",
            f"the fastest that was tried, {best.cluster} with {best.devices:,} devices, takes {format_seconds(best.run_s)}",
            f"at most {format_seconds(deadline_s)}",
            f"That is {best.run_s / deadline_s:.2f}× too slow: allow more devices, more time, or fewer tokens.",
        )
    )
