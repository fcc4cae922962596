"""Runs whose requests all come at once, simulated: closed forms are of steady loads, and a burst has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from planner.errors import Infeasible
from planner.ledger import Array
from planner.load.requests import Lengths, draw
from planner.load.simulator import simulate
from planner.mesh import Mesh
from planner.serving.deployment import stage_of
from planner.serving.iteration import Iterations
from planner.specs.traffic import Traffic
from planner.validation.serving_runs import ServedRun

__all__ = ["burst"]

_DEGREES = ("tp", "cp", "dp", "pp", "ep", "etp")
_METRICS = ("tpot", "ttft", "output_tokens_per_s")


def burst(iterations: Iterations, traffic: Traffic, runs: Sequence[ServedRun]) -> dict[str, Array]:
    """Means over a run's requests, and tokens of all of them over its time; not a number where one does not fit.

    Args:
        iterations: a row per run.
        traffic: lengths of their prompts and answers.
        runs: that differ in nothing but layout and number of requests.
    """
    found = np.array([_simulated(_row(iterations, i), traffic, run) for i, run in enumerate(runs)])
    return dict(zip(_METRICS, found.T, strict=True))


def _row(iterations: Iterations, index: int) -> Iterations:
    """The recipe on one of its meshes."""
    mesh = iterations.ctx.mesh
    one = Mesh(*(getattr(mesh, degree)[index : index + 1] for degree in _DEGREES))
    return Iterations(replace(iterations.ctx, mesh=one), iterations.pricer)


def _simulated(iterations: Iterations, traffic: Traffic, run: ServedRun) -> tuple[float, float, float]:
    software, launch = iterations.software, run.launch
    chunk = launch.chunk_tokens or float(software.chunk_tokens)
    most = int(launch.max_sequences or float(software.max_sequences)) * int(iterations.ctx.mesh.dp[0])
    stage = stage_of(iterations, traffic.isl, traffic.osl, chunk, most)
    uncut = _uncut(traffic.osl, run.longest_answer) if traffic.length_scv else traffic.osl
    lengths = Lengths(traffic.isl, uncut, traffic.length_scv, traffic.length_scv)
    asked = draw(lengths, round(run.load))
    asked = replace(asked, output_tokens=np.minimum(asked.output_tokens, run.longest_answer).astype(np.int64))
    try:
        done = simulate(asked, stage.iteration, stage.rules, stage.pool, stages=stage.stages)
    except Infeasible:
        return np.nan, np.nan, np.nan
    longer = asked.output_tokens > 1
    each_s = (done.finish_s - done.first_token_s)[longer] / (asked.output_tokens[longer] - 1)
    around_s = software.admitted_s(traffic.isl) + run.frontend_s
    return (
        float(np.mean(each_s)) if longer.any() else np.nan,
        float(np.mean(done.first_token_s)) + around_s,
        float(np.sum(asked.output_tokens) / (done.span_s + around_s)),
    )


def _uncut(mean: float, longest: float) -> float:
    """Mean of an exponential law that has the given one where it is cut: ``m·(1 − exp(−longest/m)) = mean``.

    >>> round(_uncut(100.0, 1e9)), round(_uncut(345.0, 512.0))
    (100, 603)
    """
    if not np.isfinite(longest) or mean >= longest:
        return min(mean, longest)
    low, high = mean, 1e3 * longest
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if -middle * np.expm1(-longest / middle) < mean else (low, middle)
    return low
