"""Serving rows scored: runs alike but for their load and layout are priced together and held against what they measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from planner.costs.queueing import clients_wait_s
from planner.costs.serving import kv_transfer_s
from planner.ledger import Array
from planner.mesh import Mesh
from planner.serving.aggregated import Steady, steady
from planner.serving.capacity import capacity
from planner.serving.composition import Composition
from planner.serving.iteration import Iterations
from planner.specs.stack import Stack
from planner.specs.traffic import Traffic
from planner.technique import ServingContext, discover
from planner.validation.bursts import burst
from planner.validation.ranking import Comparison
from planner.validation.scores import ScoredRow
from planner.validation.serving_exclusions import contradicted, excluded, repeated
from planner.validation.serving_runs import ServedRun, served_run
from planner.validation.table import Row, Table, Unsupported

__all__ = ["ServingScores", "predict", "score_serving", "served_runs"]

Runs: TypeAlias = Sequence[ServedRun]
_GROUPS = ("accelerator", "model", "engine", "quality")
_MILLI = 1e-3
_SWEEP = ("engine", "engine_version", "model", "accelerator", "weight_dtype", "input_len", "output_len")


@dataclass(slots=True)
class ServingScores:
    """What the rows of one file came to: entries per row and metric, runs that may be ranked, defaults taken."""

    rows: list[ScoredRow] = field(default_factory=list)
    runs: list[Comparison] = field(default_factory=list)
    defaults: Counter[str] = field(default_factory=Counter)


def score_serving(table: Table) -> ServingScores:
    """Scores every row of a serving table; rows of quality C contradict themselves or lack their layout, and are not counted."""
    scores = ServingScores()
    runs: list[tuple[ServedRun, dict[str, float]]] = []
    for row in table.rows:
        groups = _groups(row)
        asked = _measured(row)
        if not asked:
            scores.rows.append(
                ScoredRow(row.row_id, row.file, "", "skipped", "nothing is measured", groups=groups)
            )
            continue
        try:
            runs.append((served_run(row, scores.defaults), asked))
        except Unsupported as error:
            scores.rows += [
                ScoredRow(row.row_id, row.file, metric, "unsupported", str(error), groups=groups)
                for metric in asked
            ]
    apart, again = contradicted(runs), repeated(runs)
    for (run, asked), found in zip(runs, predict([run for run, _ in runs]), strict=True):
        row_id = run.row.row_id
        scores.rows += _scored(run, asked, found, (row_id in apart, row_id in again), scores)
    return scores


def served_runs(table: Table) -> list[tuple[ServedRun, dict[str, float]]]:
    """Runs of a table that can be priced, with what they measured."""
    found = []
    for row in table.rows:
        asked = _measured(row)
        if asked and row.text("quality") != "C":
            try:
                found.append((served_run(row, Counter()), asked))
            except Unsupported:
                continue
    return found


def _groups(row: Row) -> dict[str, str]:
    return {name: row.text(name) for name in _GROUPS} | {"source": row.file, "family": row.text("model")}


def _measured(row: Row) -> dict[str, float]:
    """What a row measured, by metric, in SI units."""
    found: dict[str, float] = {}
    columns = {
        "tpot": ("tpot_ms", _MILLI), "ttft": ("ttft_ms", _MILLI), "latency": ("latency_ms", _MILLI),
        "output_tokens_per_s": ("output_tokens_per_s", 1.0), "peak_memory": ("memory_gb_per_device", 1e9),
    }  # fmt: skip
    for metric, (column, unit) in columns.items():
        try:
            value = row.number(column)
        except Unsupported:
            continue
        if value:
            found[metric] = value * unit
    try:
        devices, each = row.number("n_devices"), row.number("tokens_per_s_per_device")
    except Unsupported:
        devices = each = None
    if "output_tokens_per_s" not in found and each and devices:
        found["output_tokens_per_s"] = each * devices
    return found


def _scored(
    run: ServedRun,
    asked: Mapping[str, float],
    found: Mapping[str, float] | str,
    apart_or_again: tuple[bool, bool],
    scores: ServingScores,
) -> list[ScoredRow]:
    row, entries = run.row, []
    for metric, measured in asked.items():
        groups = _groups(row)
        if isinstance(found, str) or metric not in found:
            reason = (
                found if isinstance(found, str) else f"no {metric} of a run that was driven by {run.driver}"
            )
            entries.append(ScoredRow(row.row_id, row.file, metric, "unsupported", reason, groups=groups))
            continue
        reason = excluded(run, metric, asked, *apart_or_again)
        status = "excluded" if reason else "scored"
        entries.append(
            ScoredRow(row.row_id, row.file, metric, status, reason, measured, found[metric], groups)
        )
        if metric == "output_tokens_per_s" and run.driver == "offline":
            scores.runs.append(_comparison(run, entries[-1]))
    return entries


def _comparison(run: ServedRun, entry: ScoredRow) -> Comparison:
    """A run among those that differ in layout alone, by its rate per device."""
    tp, pp, dp, _ = run.degrees
    devices = tp * pp * dp
    each = replace(
        entry,
        metric="ranking",
        measured=(entry.measured or 0.0) / devices,
        predicted=(entry.predicted or 0.0) / devices,
    )
    cells = tuple(run.row.text(column) for column in _SWEEP)
    return Comparison(each, (run.row.file, " ".join(filter(None, cells)), *cells), run.degrees)


# -- prediction ----------------------------------------------------------------------------------------------------------


def predict(
    runs: Sequence[ServedRun], stacks: Mapping[str, Stack] | None = None
) -> list[dict[str, float] | str]:
    """Metrics of every run in SI units, or why there are none.

    Args:
        runs: any runs.
        stacks: constants that replace those of a run's stack, by its name.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        groups[run.group].append(index)
    found: list[dict[str, float] | str] = [""] * len(runs)
    for indices in groups.values():
        some = [runs[i] for i in indices]
        stack = (stacks or {}).get(some[0].stack.name, some[0].stack)
        for index, result in zip(indices, _group(some, stack), strict=True):
            found[index] = result
    return found


def _group(runs: Sequence[ServedRun], stack: Stack) -> list[dict[str, float] | str]:
    """Runs of one model, machine, engine, format, lengths and driver."""
    first = runs[0]
    tp, pp, dp, ep = (np.array([float(run.degrees[i]) for run in runs]) for i in range(4))
    mesh = Mesh(tp, np.ones_like(tp), dp, pp, ep, tp * dp / ep)
    load = np.array([run.load for run in runs])
    traffic = Traffic(
        first.isl, first.osl, concurrency=1 if first.driver == "concurrency" else None, length_scv=first.length_scv,
        requests_per_client=first.requests_per_client,
    )  # fmt: skip
    defaults = {t.slot: t.choices[0] for t in discover("serving").values() if t.default}
    knobs = {slot: choice for slot, choice in defaults.items() if slot is not None}
    knobs |= {"weights": first.weights, "cache": first.cache}
    if first.exchanged:
        knobs["experts"] = "exchanged"
    if first.weights == "fp16":
        knobs["activations"] = "fp16"
    ctx = ServingContext(first.model, first.cluster, traffic, stack, mesh, knobs)
    iterations = Iterations(ctx)
    columns = _DRIVERS[first.driver](iterations, traffic, load, runs)
    found = [{name: float(values[i]) for name, values in columns.items()} for i in range(len(runs))]
    return [{name: value for name, value in one.items() if np.isfinite(value)} for one in found]


def _closed(iterations: Iterations, traffic: Traffic, load: Array, runs: Runs) -> dict[str, Array]:
    """Clients that replace every answer at once; those whose requests the caches cannot hold wait outside."""
    launch = runs[0].launch
    chunk = _chunk_tokens(runs, iterations, load)
    held = capacity(
        iterations, traffic.isl, traffic.osl, chunk, launch.max_sequences or None, preempting=True
    )
    # It ran: where not one request is predicted to fit, the prediction is wrong.
    inside = np.where(held.sequences < 1.0, load, np.minimum(load, held.sequences))
    state = steady(iterations, traffic, inside, chunk, held_back=launch.held_back_iterations)
    rate = state.requests_per_s
    held_back_s = launch.held_back_iterations * state.tpot_s + runs[0].frontend_s
    # A prompt that an iteration has to leave unfinished is gone on with by kernels that no short request has run before.
    split = inside / iterations.ctx.mesh.dp * traffic.isl > chunk
    stalled_s = (
        np.where(split, float(iterations.software.compile_s), 0.0) * _first(traffic) * runs[0].compiles
    )
    ttft_s = state.ttft_s + (load - inside) / rate + held_back_s + stalled_s
    return {
        "tpot": state.tpot_s, "ttft": ttft_s, "latency": ttft_s + (traffic.osl - 1.0) * state.tpot_s,
        "output_tokens_per_s": rate * traffic.osl,
    }  # fmt: skip


def _first(traffic: Traffic) -> float:
    """The share of requests that come first of their clients, all at once."""
    return 0.0 if traffic.requests_per_client is None else 1.0 / traffic.requests_per_client


def _chunk_tokens(runs: Runs, iterations: Iterations, load: Array) -> Array:
    """Tokens of an iteration: as the launch says, or by the engine's default."""
    launch = runs[0].launch
    stated = launch.chunk_prompts * (runs[0].row.number("input_len") or 0.0)
    said = launch.chunk_tokens or stated or float(iterations.software.chunk_tokens)
    return np.asarray(said + launch.clients_beside * load)


def _pools(iterations: Iterations, traffic: Traffic, load: Array, runs: Runs) -> dict[str, Array]:
    """Clients that replace every answer, of workers for prompts and of others for generation.

    A client is at a worker for prompts, on its cache's way, or generates (Little's law): the number that generates is found by
    bisection. Clients of one worker for prompts wait for each other, all of them at the beginning of a run; those for whom no
    worker for generation has a place wait before it.
    """
    counts = np.array([run.workers or (1.0, 1.0) for run in runs])
    layout = np.array([run.prefill or (1, 1, 1, 1, 1.0) for run in runs], dtype=np.float64)
    tp, pp, dp, ep, prompts = layout.T
    mesh = Mesh(tp, np.ones_like(tp), dp, pp, ep, tp * dp / ep)
    knobs = {**iterations.ctx.knobs, "experts": "gathered"}  # workers for prompts may have another layout
    prefill = Iterations(replace(iterations.ctx, mesh=mesh, knobs=knobs), iterations.pricer)
    zero, keys = np.zeros_like(load), np.full_like(load, traffic.prompt_context)
    prompt_s = prefill(zero, zero, prompts * dp * traffic.isl, keys)
    # Where prompts wait, an iteration takes as many as it has room for.
    chunk = runs[0].launch.chunk_tokens or float(iterations.software.chunk_tokens)
    several = np.maximum(prompts, np.floor(chunk / traffic.isl))
    several_s = prefill(zero, zero, several * dp * traffic.isl, keys)
    lanes = counts[:, 0] * pp * dp  # ranks that take a batch of prompts each, one after the other
    most = lanes * several / several_s
    context, answer = traffic.isl + traffic.osl / 2.0, max(traffic.osl - 1.0, 1.0)
    transfer_s = _transfer_s(prefill, iterations, traffic, prompt_s)
    others = np.maximum(load / lanes - 1.0, 0.0)
    first = _first(traffic)

    def step_s(n: Array) -> Array:
        each = n / iterations.ctx.mesh.pp
        return np.asarray(iterations(each, each * context, zero, zero))

    def before_s(rate: Array, token_s: Array) -> Array:
        """Seconds until the worker for generation returns the first token, with its first iteration, at a rate."""
        busy = np.minimum(rate / most, 1.0)
        wait_s = (1.0 - first) * clients_wait_s(others, several_s / several, busy)
        wait_s = wait_s + first * others / 2.0 * several_s / several
        own_s = prompt_s + busy * (several_s - prompt_s)
        # By one worker, then by the other, which has begun an iteration without it; text becomes tokens once.
        outside_s = iterations.software.admitted_s(traffic.isl) + float(iterations.software.admission_s)
        outside_s = outside_s + (2.0 + runs[0].launch.held_back_iterations) * token_s + runs[0].frontend_s
        return np.asarray(own_s + wait_s + transfer_s + outside_s)

    most_sequences = runs[0].launch.max_sequences or np.inf  # of a rank that attends to its own
    low, high = zero, np.minimum(load / counts[:, 1], most_sequences * iterations.ctx.mesh.dp)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        token_s = step_s(middle)
        rate = middle / (answer * token_s) * counts[:, 1]
        room = (rate <= most) & (rate * before_s(rate, token_s) + middle * counts[:, 1] <= load)
        low, high = np.where(room, middle, low), np.where(room, high, middle)
    tpot_s = step_s(high)
    rate = high * counts[:, 1] / (answer * tpot_s)
    return {
        "tpot": tpot_s,
        "ttft": np.maximum(before_s(rate, tpot_s), load / rate - answer * tpot_s),
        "output_tokens_per_s": rate * traffic.osl,
    }


def _transfer_s(prefill: Iterations, decode: Iterations, traffic: Traffic, prompt_s: Array) -> Array:
    """Seconds that a cache's way to a worker for generation adds, over the cluster's outermost links."""
    senders, receivers = (i.ctx.mesh.tp * i.ctx.mesh.pp for i in (prefill, decode))
    n_bytes = prefill.footprint().cache_bytes(traffic.isl) * senders
    bytes_per_s = prefill.ctx.cluster.tiers[-1].effective_bytes_per_s * np.minimum(senders, receivers)
    return np.asarray(kv_transfer_s(n_bytes, bytes_per_s, prompt_s, float(prefill.ctx.model.n_layers)))


def _offline(iterations: Iterations, traffic: Traffic, load: Array, runs: Runs) -> dict[str, Array]:
    """All requests are there: the caches, the engine's cap or the run's length say how many run at once.

    Answers of one length end together where they began together: the run is as many full waves as there are, and a last one.
    """
    launch, requests = runs[0].launch, runs[0].requests
    chunk = np.full_like(load, float(iterations.software.chunk_tokens))
    held = capacity(
        iterations, traffic.isl, traffic.osl, chunk, launch.max_sequences or None,
        cache_fraction=launch.cache_fraction or None,
    )  # fmt: skip
    most = np.clip(held.sequences, 1.0, requests)
    state = steady(iterations, traffic, most, chunk, queued=True)
    if not np.isfinite(requests):
        return {"output_tokens_per_s": state.requests_per_s * traffic.osl}
    waves = np.floor(requests / most)
    rest = requests - waves * most
    last = steady(iterations, traffic, np.maximum(rest, 1.0), chunk, queued=True)
    run_s = waves * most / state.requests_per_s + rest / last.requests_per_s
    return {"output_tokens_per_s": requests / run_s * traffic.osl}


def _rate(iterations: Iterations, traffic: Traffic, load: Array, runs: Runs) -> dict[str, Array]:
    """Arrivals: the requests in flight that answer as many per second, by bisection.

    A run of ``N`` requests at a rate ``λ`` lasts ``N/λ`` and the last answer, so that it answers ``N/(N/λ + E)`` per second with
    an answer's time ``E``. Where more arrive than are answered, the wait grows as long as the run lasts, and no time to the first
    token is foretold.
    """
    launch = runs[0].launch
    chunk = np.full_like(load, launch.chunk_tokens or float(iterations.software.chunk_tokens))
    cap = runs[0].cap or launch.max_sequences or None
    most = np.maximum(capacity(iterations, traffic.isl, traffic.osl, chunk, cap).sequences, 1.0)
    low, high = np.zeros_like(load), most
    for _ in range(_BISECTIONS):
        middle = np.maximum((low + high) / 2.0, 1e-3)
        state = steady(iterations, traffic, middle, chunk)
        enough = state.requests_per_s >= _asked(state, traffic, load, runs)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    state = steady(iterations, traffic, high, chunk)
    asked = _asked(state, traffic, load, runs)
    kept_up = state.requests_per_s >= asked * (1.0 - _CLOSE)
    rate = np.minimum(state.requests_per_s, asked)
    return {
        "tpot": state.tpot_s,
        "ttft": np.where(kept_up & (state.prefill_load < _MOST_LOAD), state.ttft_s, np.nan),
        "output_tokens_per_s": rate * traffic.osl,
    }


def _asked(state: Steady, traffic: Traffic, load: Array, runs: Runs) -> Array:
    """Answers per second over the whole run, if the engine keeps up and nobody waits."""
    answer_s = state.ttft_s - state.wait_s + (traffic.osl - 1.0) * state.tpot_s
    return np.asarray(1.0 / (1.0 / load + answer_s / runs[0].requests))


_BISECTIONS, _CLOSE, _MOST_LOAD = 12, 0.02, 0.9


def _static(iterations: Iterations, traffic: Traffic, load: Array, runs: Runs) -> dict[str, Array]:
    """One batch: all prompts, then a token for every sequence until the longest answer is done."""
    zero = np.zeros_like(load)
    batch = np.maximum(load / iterations.ctx.mesh.pp, np.minimum(load, 1.0))
    prefill_s = iterations(zero, zero, batch * traffic.isl, np.full_like(load, traffic.prompt_context))
    step_s = iterations(batch, batch * (traffic.isl + traffic.osl / 2.0), zero, zero)
    # Fewer sequences than stages: some have no batch to issue.
    stages = iterations.ctx.mesh.pp
    step_s = step_s - np.maximum(stages - load, 0.0) * iterations.host_s(Composition(batch, zero, zero, zero))
    latency_s = prefill_s + (traffic.osl - 1.0) * step_s
    footprint = iterations.footprint()
    cache = footprint.cache_bytes(traffic.isl + traffic.osl) * load / iterations.ctx.mesh.dp
    return {
        "latency": latency_s, "tpot": step_s, "ttft": prefill_s, "output_tokens_per_s": load * traffic.osl / latency_s,
        "peak_memory": footprint.weights_bytes + cache + float(iterations.pricer.stack.framework_bytes),
    }  # fmt: skip


_DRIVERS: Mapping[str, Callable[[Iterations, Traffic, Array, Runs], dict[str, Array]]] = {
    "concurrency": _closed,
    "offline": _offline,
    "burst": lambda iterations, traffic, load, runs: burst(iterations, traffic, runs),
    "static": _static,
    "rate": _rate,
    "pools": _pools,
}
