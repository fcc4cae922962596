"""What is simulated: the engines of a plan or of a pool file, and requests on their way through them.

An engine is a replica, with one queue of its own; of ``pp`` pipeline stages, as many batches are in flight
(:mod:`planner.load.pipelined`). Requests go to engines at random, so that each has arrivals of its own, or in turn. Pools of
prompts and of generation are two stages: a request leaves the first with its first token, and enters the second when its cache
has come over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from planner.errors import Problem, SpecError
from planner.load.iteration_time import Array, IterationTime, Sampled
from planner.load.requests import Requests
from planner.load.scheduler import KvPool, Scheduler, scheduler
from planner.load.simulator import Run, simulate

if TYPE_CHECKING:
    from planner.serving.iteration import Iterations
    from planner.serving.plan import Pool, ServePlan
    from planner.specs.serve_problem import ServeProblem
    from planner.specs.traffic import Traffic

__all__ = ["Deployment", "Stage", "deployment_of", "run"]

_WATERMARK = 0.01
"""Of the blocks, kept free at an admission: vLLM's ``CacheConfig.watermark``."""
_ROUTER_SEED = 1
_ALL_TOKENS = 1024.0
"""Prompt tokens that the capacity of a decode pool leaves activations for, as its search does."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Equal engines.

    Attributes:
        role: ``aggregated``, ``prefill`` or ``decode``.
        engines: how many; each has so many pipeline ``stages``.
        at_random: whether requests go to engines at random, not in turn.
        accepted: tokens that a request gains in an iteration, of drafts that are as good as on average.
        weight: of several pools of one phase, the part of the requests that goes to this one, relative to the others.
    """

    role: str
    engines: int
    iteration: IterationTime
    rules: Scheduler
    pool: KvPool
    stages: int = 1
    at_random: bool = False
    accepted: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """One stage, or prefill stages and decode stages.

    Attributes:
        admission_s: added to every request by what is around the engines; ``admission_token_s`` per token of its prompt.
        transfer_s: seconds from the first stage to the second by prompt length.
    """

    stages: tuple[Stage, ...]
    admission_s: float = 0.0
    transfer_s: Callable[[Array], Array] | None = None
    admission_token_s: float = 0.0


def run(
    deployment: Deployment,
    requests: Requests,
    *,
    concurrency: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Serves the requests, as :func:`planner.load.simulator.simulate` does for one engine.

    Raises:
        SpecError: a closed loop over two stages.
        Infeasible: a request is larger than a cache.
    """
    first, second = (
        tuple(stage for stage in deployment.stages if (stage.role == "decode") == later)
        for later in (False, True)
    )
    if not second:
        done = _phase_run(first, requests, concurrency, on_progress)
        return _admitted(done, deployment)
    if concurrency is not None:
        raise SpecError(
            Problem(
                "--concurrency",
                "a closed loop through two pools",
                "a rate or a trace",
                "Give --rate instead.",
            )
        )
    assert deployment.transfer_s is not None
    one_token = replace(requests, output_tokens=np.ones_like(requests.output_tokens))
    prompts = _phase_run(first, one_token, None, on_progress)
    arrives_s = prompts.first_token_s + deployment.transfer_s(requests.prompt_tokens)
    longer = np.flatnonzero(requests.output_tokens > 1)
    order = longer[np.argsort(arrives_s[longer], kind="stable")]
    answers = _phase_run(
        second,
        Requests(
            arrives_s[order],
            requests.prompt_tokens[order] + 1,
            requests.output_tokens[order] - 1,
            requests.prompt_tokens[order],  # the cache came over: the first token alone is computed
            requests.priority[order],
        ),
        None,
        on_progress,
    )
    finish_s, preemptions = arrives_s.copy(), prompts.preemptions.copy()
    finish_s[order] = answers.finish_s
    preemptions[order] += answers.preemptions
    both = Run(
        requests,
        arrives_s,
        finish_s,
        preemptions,
        prompts.iterations + answers.iterations,
        prompts.request_iterations + answers.request_iterations,
        float(np.max(finish_s) - requests.arrival_s[0]),
        max(prompts.busy_s, answers.busy_s),
        answers.decode_iteration_s,
    )
    return _admitted(both, deployment)


def _admitted(done: Run, deployment: Deployment) -> Run:
    """The run as clients see it."""
    seconds = deployment.admission_s + deployment.admission_token_s * done.requests.prompt_tokens
    return replace(done, first_token_s=done.first_token_s + seconds, finish_s=done.finish_s + seconds)


def _phase_run(
    stages: tuple[Stage, ...],
    requests: Requests,
    concurrency: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> Run:
    """Requests at random over pools of one phase, by what each of them carries."""
    if len(stages) == 1:
        return _stage_run(stages[0], requests, concurrency, on_progress)
    weights = np.array([stage.weight for stage in stages])
    chosen = np.random.default_rng(_ROUTER_SEED + 1).choice(
        len(stages), len(requests), p=weights / weights.sum()
    )
    shares, runs, before = [], [], 0
    for index, stage in enumerate(stages):
        own = np.flatnonzero(chosen == index)
        if not len(own):
            continue

        def tell(done: int, _: int, before: int = before) -> None:
            if on_progress is not None:
                on_progress(before + done, len(requests))

        shares.append(own)
        runs.append(_stage_run(stage, _part(requests, own), None, tell))
        before += len(own)
    return _together(requests, shares, runs)


def _part(requests: Requests, index: Array) -> Requests:
    return Requests(
        *(
            getattr(requests, name)[index]
            for name in ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "priority")
        )
    )


def _stage_run(
    stage: Stage,
    requests: Requests,
    concurrency: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> Run:
    """Every engine with its requests; ``busy_s`` is the mean engine's."""
    shares = _shares(stage, len(requests), concurrency)
    engines = len(shares)
    finished, runs = 0, []
    for index, share in enumerate(shares):
        loop = None if concurrency is None else max((concurrency + engines - 1 - index) // engines, 1)
        before = finished

        def tell(done: int, _: int, before: int = before) -> None:
            if on_progress is not None:
                on_progress(before + done, len(requests))

        part = _part(requests, share)
        part = replace(part, output_tokens=_iterations(part.output_tokens, stage.accepted))
        runs.append(
            simulate(
                part,
                stage.iteration,
                stage.rules,
                stage.pool,
                stages=stage.stages,
                concurrency=loop,
                on_progress=tell,
            )
        )
        finished += len(share)
    return _together(requests, shares, runs)


def _iterations(output_tokens: Array, accepted: float) -> Array:
    """Iterations that yield so many tokens, the first among prompts."""
    return output_tokens if accepted == 1.0 else 1 + np.ceil((output_tokens - 1) / accepted).astype(np.int64)


def _shares(stage: Stage, count: int, concurrency: int | None) -> list[Array]:
    """Which requests go to which engine; clients of a closed loop are dealt out evenly."""
    if not stage.at_random or concurrency is not None:
        engines = min(stage.engines, count)
        return [np.arange(i, count, engines) for i in range(engines)]
    chosen = np.random.default_rng(_ROUTER_SEED).integers(stage.engines, size=count)
    found = [np.flatnonzero(chosen == engine) for engine in range(stage.engines)]
    return [share for share in found if len(share)]


def _together(requests: Requests, shares: list[Array], runs: list[Run]) -> Run:
    """One run of them all, in order of arrival."""
    place = np.concatenate(shares)
    arrival_s = np.concatenate([part.requests.arrival_s for part in runs])
    order = (
        np.argsort(arrival_s, kind="stable") if np.any(np.diff(requests.arrival_s) < 0) else np.argsort(place)
    )
    place = place[order]
    asked = Requests(
        arrival_s[order],
        requests.prompt_tokens[place],
        requests.output_tokens[place],
        requests.cached_tokens[place],
        requests.priority[place],
    )
    first_s, finish_s, preemptions = (
        np.concatenate([getattr(part, name) for part in runs])[order]
        for name in ("first_token_s", "finish_s", "preemptions")
    )
    return Run(
        asked,
        first_s,
        finish_s,
        preemptions,
        sum(part.iterations for part in runs),
        sum(part.request_iterations for part in runs),
        float(np.max(finish_s) - np.min(arrival_s)),
        float(np.mean([part.busy_s for part in runs])),
        np.concatenate([part.decode_iteration_s for part in runs], axis=1),
    )


# -- of a plan -----------------------------------------------------------------------------------------------------------------


def deployment_of(plan: ServePlan, policy: str | None = None, routing: str = "random") -> Deployment:
    """The engines of a serving plan; prompts are cut to its budget and run beside generation, unless ``policy`` says otherwise.

    Args:
        plan: the plan.
        policy: name of a batching policy.
        routing: how requests come to replicas: ``random`` or ``turn``.

    Raises:
        SpecError: the plan's model, cluster or stack cannot be found, or there is no such policy.
    """
    from planner.engine.pricer import Pricer
    from planner.serving.candidates import iterations_of
    from planner.serving.replay import part_of, problem_of
    from planner.serving.space import mesh_of, recipe_of, row_of

    problem = problem_of(plan)
    if plan.mode == "offloaded":
        return Deployment((_blocks(plan.pools[0], problem, policy, routing),))
    pools = plan.pools
    if plan.mode == "ping_pong":
        from planner.serving.ping_pong_plan import generating

        pools = plan.pools[:1]
    if plan.mode == "static" and policy is None:
        policy = "static"
    stages, all_iterations, roles = [], [], [pool.role for pool in pools]
    for pool in pools:
        part = part_of(problem, pool)
        row = row_of(pool.mesh)
        iterations = iterations_of(
            part, recipe_of(pool.knobs), mesh_of(row), Pricer(part.cluster, part.stack)
        )
        stage = _stage(pool, iterations, float(problem.traffic.isl), float(problem.traffic.osl), policy)
        stages.append(
            replace(stage, at_random=routing == "random", weight=_weight(pool, stage, problem.traffic))
        )
        all_iterations.append(iterations)
    if plan.mode == "ping_pong":
        stage, iterations = generating(
            problem, plan.pools[1:], Pricer(problem.cluster, problem.stack), policy
        )
        stages.append(replace(stage, at_random=routing == "random"))
        all_iterations.append(iterations)
        roles.append(stage.role)
    software = all_iterations[0].software
    senders, receivers = (
        [i for i, known in zip(all_iterations, roles, strict=True) if known == role]
        for role in ("prefill", "decode")
    )
    return Deployment(
        tuple(stages),
        float(software.admission_s),
        _transfer(senders, receivers) if receivers else None,
        float(software.admission_token_s),
    )


def _blocks(pool: Pool, problem: ServeProblem, policy: str | None, routing: str) -> Stage:
    """Devices that answer a block at a time: a static batch of all its sequences."""
    from planner.engine.pricer import Pricer
    from planner.serving.offloaded import block_time

    if policy not in (None, "static"):
        raise SpecError(
            Problem("scheduler", repr(policy), "static: an offloaded plan answers a block at a time")
        )
    times = block_time(problem, Pricer(problem.cluster, problem.stack), pool)
    most = int(pool.knobs["gpu_batch_size"]) * int(pool.knobs["gpu_batches"])
    rules = scheduler("static", max_requests=most)
    return Stage(pool.role, pool.replicas, times, rules, KvPool(), at_random=routing == "random")


def _weight(pool: Pool, stage: Stage, traffic: Traffic) -> float:
    """What a pool carries beside others of its phase: answers in proportion to those in flight, prompts to its pace."""
    if pool.role == "decode":
        return float(pool.replicas * pool.in_flight)
    budget = float(stage.rules.token_budget)
    full_s = float(stage.iteration(0.0, 0.0, budget, budget * traffic.prompt_context))
    return pool.replicas * stage.stages * budget / full_s


def _stage(pool: Pool, iterations: Iterations, isl: float, osl: float, policy: str | None) -> Stage:
    ranks = pool.mesh["dp"]
    chunk = float(pool.knobs.get("chunk_tokens", _ALL_TOKENS))
    most = int(pool.knobs.get("max_sequences", int(float(iterations.software.max_sequences)) * ranks))
    return stage_of(iterations, isl, osl, chunk, most, role=pool.role, engines=pool.replicas, policy=policy)


def stage_of(
    iterations: Iterations,
    isl: float,
    osl: float,
    chunk_tokens: float,
    max_sequences: int,
    *,
    role: str = "aggregated",
    engines: int = 1,
    policy: str | None = None,
) -> Stage:
    """Engines that run a recipe on one mesh, as the simulator takes them.

    Args:
        iterations: the recipe, on one row.
        isl, osl: typical lengths.
        chunk_tokens: tokens of an iteration, per attention rank.
        max_sequences: requests that one engine runs at once.
        policy: name of a batching policy; None: chunks of prompts, beside generation or first as the engine has it.
    """
    from planner.serving.capacity import capacity

    mesh = iterations.ctx.mesh
    budget = int(chunk_tokens) * int(mesh.dp[0])
    held = capacity(iterations, isl, osl, chunk_tokens)
    block = int(float(iterations.software.block_tokens))
    blocks = int(held.tokens[0] / block)
    if scheduler(policy or "sarathi").takes_all:
        budget = max(budget, int(max_sequences * isl))
    rules = scheduler(policy or "sarathi", max(max_sequences, 1), budget)
    generates = role == "decode"
    if policy is None:
        rules = replace(rules, mixed=generates or iterations.software.prompts == "beside")

    def price(decodes: Array, context: Array, prefill: Array, prefill_context: Array) -> Array:
        if generates:  # what joins has its cache: a token more of the same step, and no prompt
            decodes, context, prefill = decodes + prefill, context + prefill_context, np.zeros_like(prefill)
        return iterations(decodes, context, prefill, prefill_context / np.maximum(prefill, 1.0))

    table = Sampled.of(price, rules.max_requests, budget, isl + osl)
    cache = KvPool(blocks, block, int(_WATERMARK * blocks))
    return Stage(role, engines, table, rules, cache, int(mesh.pp[0]), accepted=iterations.accepted)


def _transfer(senders: list[Iterations], receivers: list[Iterations]) -> Callable[[Array], Array]:
    """Seconds that a cache's way adds to a prompt of its own, from any pool to any: the slowest of their ways."""
    ways = [_way(prefill, decode) for prefill in senders for decode in receivers]
    return lambda prompt_tokens: np.asarray(np.max([way(prompt_tokens) for way in ways], axis=0))


def _way(prefill: Iterations, decode: Iterations) -> Callable[[Array], Array]:
    """Every sender's link, or every receiver's if they are fewer, of the slower network."""
    from planner.costs.serving import kv_transfer_s

    senders, receivers = (float(i.ctx.mesh.tp[0] * i.ctx.mesh.pp[0]) for i in (prefill, decode))
    senders *= float(prefill.ctx.mesh.cp[0]) if prefill.ctx.knobs["prompt_ranks"] == "pass_kv" else 1.0
    slower = min(i.ctx.cluster.tiers[-1].effective_bytes_per_s for i in (prefill, decode))
    bytes_per_s = slower * min(senders, receivers)
    layers = float(prefill.ctx.model.n_layers)

    def seconds(prompt_tokens: Array) -> Array:
        n_bytes = prefill.footprint().cache_bytes(prompt_tokens) * senders
        alone_s = prefill(0.0, 0.0, prompt_tokens, (prompt_tokens + 1.0) / 2.0)
        return np.asarray(kv_transfer_s(n_bytes, bytes_per_s, alone_s, layers))

    return seconds
