"""Options of every call of a reinforcement-learning step, priced by the engines of training and of serving.

A step of PPO: the actor answers prompts; reference, reward and critic read prompts and answers; actor and critic are trained on
them. Generation and reading are iterations of a serving replica (:mod:`planner.serving.iteration`), training is the best plan of
a search. A call may run on all devices or on an aligned half, quarter, ... of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.errors import Infeasible, SpecError
from planner.errors import Problem as Fault
from planner.ledger import Array
from planner.serving.capacity import Capacity, capacity
from planner.serving.iteration import Iterations, serving_choices
from planner.serving.space import ServeSpace, mesh_of
from planner.solve.combinatorial.calls import Call, CallProblem, Option
from planner.solve.train import search
from planner.specs.cluster import Cluster
from planner.specs.cluster_file import load_cluster
from planner.specs.model import Model
from planner.specs.problem import Problem
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import Stack
from planner.specs.traffic import Traffic
from planner.specs.workload import TrainWorkload
from planner.technique import ServingContext

__all__ = ["ALGORITHMS", "ROLES", "RlhfJob", "call_problem"]

ROLES = ("actor", "critic", "reference", "reward")
ALGORITHMS = ("ppo", "grpo")
_STATES = ("parameters", "gradients", "optimizer")
_PASS_TOKENS = 8192.0  # of prompts in one pass of a model that reads: products are as fast as they get
_RESERVES = (0.0, 0.5)  # of device memory, for other models on the same devices: a fast plan, and a lean one
_MOST_LAYOUTS = 4  # per block and call: the fastest that differ in what they hold
_LEANER = 0.7  # of another option's bytes
_POINTS = (
    8  # contexts at which generation is priced; between them an iteration is nearly linear in its context
)


@dataclass(frozen=True, slots=True)
class RlhfJob:
    """A step of reinforcement learning from feedback.

    Attributes:
        models: of every role of :data:`ROLES` that the algorithm has.
        cluster: of the form NAME:NODESxDEVICES_PER_NODE.
        stack, serving_stack: the software that trains, and the software that generates.
        prompts: sequences of a step.
        prompt_tokens, answer_tokens: their lengths.
        mini_batches: optimizer steps that they are dealt to.
        algorithm: ``ppo``; ``grpo`` has no critic.
        parts: into how many parts of equal size the devices may be cut at most.
        staleness: steps that may be under way beside the one that is trained.
    """

    models: Mapping[str, Model]
    cluster: Cluster
    stack: Stack
    serving_stack: Stack
    prompts: int
    prompt_tokens: int
    answer_tokens: int
    mini_batches: int = 8
    algorithm: str = "ppo"
    parts: int = 4
    staleness: int = 0

    @property
    def tokens(self) -> int:
        """Of a prompt with its answer."""
        return self.prompt_tokens + self.answer_tokens


def call_problem(job: RlhfJob) -> CallProblem:
    """The calls of a step with everything that they may run on.

    Raises:
        SpecError: the cluster cannot be cut, mini-batches do not divide the prompts, or no replica has an allowed mesh.
        Infeasible: a call fits on no block.
    """
    if job.prompts % job.mini_batches:
        raise SpecError(
            Fault(
                "--mini-batches", f"{job.mini_batches} of {job.prompts:,} prompts", "a divisor of the prompts"
            )
        )
    sizes = [n for n in (job.cluster.devices // cut for cut in _powers(job.parts)) if n >= 1]
    parts = {n: _part(job.cluster, n) for n in dict.fromkeys(sizes)}
    options = _Options(job, parts)
    frozen = [role for role in ("reference", "reward") if role in job.models]
    trained = [role for role in ("actor", "critic") if role in job.models]
    read = [*frozen, *(["critic"] if "critic" in trained else [])]
    calls = [Call("actor generates", "actor", options.of("actor", options.generation))]
    calls += [Call(f"{role} reads", role, options.of(role, options.reading), after=(0,)) for role in read]
    inputs = tuple(range(len(calls)))
    calls += [
        Call(f"{role} trains", role, options.of(role, options.training), after=inputs, trains=True)
        for role in trained
    ]
    budget = float(job.cluster.device.memory_bytes)
    return CallProblem(tuple(calls), job.cluster.devices, budget, job.staleness)


class _Options:
    """Options by role and kind of call; models of several roles are priced once."""

    def __init__(self, job: RlhfJob, parts: Mapping[int, Cluster]) -> None:
        self.job, self.parts = job, parts
        self._priced: dict[Any, list[Option]] = {}

    def of(self, role: str, kind: Callable[[Model, Cluster], Iterator[Option]]) -> tuple[Option, ...]:
        """Options of a role's call on every aligned block of every size."""
        model = self.job.models[role]
        found: list[Option] = []
        for devices, cluster in self.parts.items():
            key = (kind.__name__, model.name, devices)
            if key not in self._priced:
                self._priced[key] = _best(kind(model, cluster))
            firsts = range(0, self.job.cluster.devices - devices + 1, devices)
            found += [replace(option, first=first) for first in firsts for option in self._priced[key]]
        if not found:
            what = f"{model.name} fits on no block of {self.job.cluster.name}"
            raise Infeasible(
                Fault(f"{role}: {kind.__name__}", what, "a block that holds it", "Use more devices.")
            )
        return tuple(found)

    def generation(self, model: Model, cluster: Cluster) -> Iterator[Option]:
        """Answers to all prompts, in as many waves as the caches ask for."""
        job = self.job
        for its, held, replicas in self._replicas(model, cluster, job.prompt_tokens, job.answer_tokens):
            each, pp = np.ceil(job.prompts / replicas), its.ctx.mesh.pp
            at_once = np.minimum(each, np.maximum(held.sequences, 1.0))
            waves = np.ceil(each / at_once)
            seconds = waves * self._answer_s(its, np.ceil(at_once / pp))
            cached = at_once / np.maximum(held.sequences, 1.0) * np.maximum(held.cache_bytes, 0.0)
            yield from self._options(its, cluster, held, seconds, cached, held.sequences >= 1.0)

    def reading(self, model: Model, cluster: Cluster) -> Iterator[Option]:
        """One pass over prompts with answers."""
        job, none = self.job, 0.0
        for its, held, replicas in self._replicas(model, cluster, job.tokens, 1):
            each, pp = np.ceil(job.prompts / replicas), its.ctx.mesh.pp
            together = np.minimum(each, max(1.0, np.floor(_PASS_TOKENS / job.tokens)))
            passes = np.ceil(each / together)
            one_s = its(none, none, together * job.tokens, (job.tokens + 1.0) / 2.0)
            seconds = (passes + pp - 1.0) * one_s / pp
            whole = list(
                self._options(its, cluster, held, seconds, np.zeros_like(seconds), held.cache_bytes > 0.0)
            )
            yield from whole
            for option in whole:  # the same with weights that rest in host memory, and are loaded first
                loaded_s = option.rests_bytes / cluster.host_link_bytes_per_s
                if option.rests_bytes <= cluster.host_memory_bytes:
                    yield replace(
                        option, layout=f"{option.layout}, from host", time_s=option.time_s + loaded_s, rests_bytes=0.0
                    )  # fmt: skip

    def training(self, model: Model, cluster: Cluster) -> Iterator[Option]:
        """The fastest plan, and the fastest that leaves memory to others."""
        job = self.job
        workload = TrainWorkload(job.prompts // job.mini_batches, job.tokens)
        for reserve in _RESERVES:
            problem = Problem(model, cluster, workload, job.stack, reserve=reserve)
            try:
                best = search(problem, top=1).best
            except Infeasible:
                continue
            memory, mesh = best.estimate.memory_bytes, best.mesh
            layout = (
                "·".join(f"{name} {mesh[name]}" for name in ("tp", "pp", "dp") if mesh[name] > 1) or "whole"
            )
            yield Option(
                0, cluster.devices, layout, job.mini_batches * best.estimate.step_time_s, 0.0,
                sum(memory.get(pool, 0.0) for pool in _STATES), memory["peak"],
            )  # fmt: skip

    def _replicas(
        self, model: Model, cluster: Cluster, isl: int, osl: int
    ) -> Iterator[tuple[Iterations, Capacity, Array]]:
        """Iterations of every recipe on the meshes that divide the devices, what they hold, and how many replicas there are."""
        problem = ServeProblem(model, cluster, Traffic(isl, osl, concurrency=1), self.job.serving_stack)
        space = ServeSpace(problem)
        sizes = np.prod(space.meshes[:, :3], axis=1)
        meshes = space.meshes[cluster.devices % sizes == 0]
        pricer = Pricer(cluster, self.job.serving_stack)
        for recipe in space.recipes():
            rows = meshes[_allowed(problem, recipe, meshes)]
            if not len(rows):
                continue
            ctx = _context(problem, recipe, rows)
            its = Iterations(ctx, pricer)
            held = capacity(its, isl, osl, _PASS_TOKENS)
            yield its, held, cluster.devices / np.prod(rows[:, :3], axis=1)

    def _answer_s(self, its: Iterations, sequences: Array) -> Array:
        """Seconds to answer some prompts at once: their pass, and a token at a time behind it."""
        job = self.job
        together = np.maximum(1.0, np.floor(_PASS_TOKENS / job.prompt_tokens))
        batch = np.minimum(sequences, together)
        prefill_s = np.ceil(sequences / batch) * its(
            0.0, 0.0, batch * job.prompt_tokens, (job.prompt_tokens + 1.0) / 2.0
        )
        further = job.answer_tokens - 1
        edges = (np.arange(min(_POINTS, max(further, 1))) + 0.5) / min(_POINTS, max(further, 1))
        tokens_s = [its(sequences, sequences * (job.prompt_tokens + x * further), 0.0, 0.0) for x in edges]
        return np.asarray(prefill_s + further * np.mean(tokens_s, axis=0))

    def _options(
        self, its: Iterations, cluster: Cluster, held: Capacity, seconds: Array, cached: Array, fits: Array
    ) -> Iterator[Option]:
        """Rows that fit as options; weights arrive over the network's outermost tier."""
        rate = self.job.cluster.tiers[-1].effective_bytes_per_s
        mesh = its.ctx.mesh
        for i in np.flatnonzero(fits & np.isfinite(seconds)):
            weights = float(held.weights_bytes[i])
            degrees = {"tp": mesh.tp[i] * mesh.dp[i], "pp": mesh.pp[i]}
            size = float(mesh.tp[i] * mesh.dp[i] * mesh.pp[i])
            degrees["dp"] = cluster.devices / size
            layout = "·".join(f"{name} {n:g}" for name, n in degrees.items() if n > 1) or "whole"
            peak = weights + float(held.activation_bytes[i]) + held.reserved_bytes + float(cached[i])
            yield Option(0, cluster.devices, layout, float(seconds[i]), weights / rate, weights, peak)


def _best(options: Iterator[Option]) -> list[Option]:
    """Options that nothing beats in time, in what they hold and in what they move; the fastest few."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.time_s, o.peak_bytes)):
        if all(_leaner(option, other) for other in kept):
            kept.append(option)
    return kept[:_MOST_LAYOUTS]


def _leaner(option: Option, other: Option) -> bool:
    """Whether it leaves clearly more to other models: a small difference rarely lets one more in, and costs the search much."""
    return (
        option.rests_bytes < _LEANER * other.rests_bytes
        or option.peak_bytes - option.rests_bytes < _LEANER * (other.peak_bytes - other.rests_bytes)
    )


def _context(problem: ServeProblem, recipe: Mapping[str, str], rows: Any) -> ServingContext:
    return ServingContext(
        problem.model, problem.cluster, problem.traffic, problem.stack, mesh_of(rows), recipe
    )


def _allowed(problem: ServeProblem, recipe: Mapping[str, str], rows: Any) -> Any:
    """Meshes that no technique of the recipe refuses."""
    alive = np.ones(len(rows), dtype=bool)
    ctx = _context(problem, recipe, rows)
    for technique in serving_choices(recipe):
        for check in technique.valid(ctx):
            alive &= np.broadcast_to(check.ok, alive.shape)
    return alive


def _part(cluster: Cluster, devices: int) -> Cluster:
    """As many neighbouring devices of a cluster.

    Raises:
        SpecError: it has several kinds of nodes, or is a file without counts.
    """
    name, _, counts = cluster.name.partition(":")
    if devices == cluster.devices:
        return cluster
    if len(cluster.groups) > 1 or not counts:
        raise SpecError(Fault("--cluster", f"{cluster.name} cannot be cut", "NAME:NODESxDEVICES_PER_NODE"))
    per_node = cluster.groups[0].devices_per_node
    nodes, width = (devices // per_node, per_node) if devices >= per_node else (1, devices)
    spec = f"{name}:{nodes}x{width}"
    return replace(load_cluster(spec), name=spec)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
