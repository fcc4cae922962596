"""What every serving exporter needs of a plan: its specifications, what its replicas hold, and on which devices they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from planner.engine.pricer import Pricer
from planner.errors import ExportError, Problem
from planner.mesh import Mesh
from planner.serving.candidates import iterations_of
from planner.serving.capacity import Capacity, capacity
from planner.serving.launcher import Replicas
from planner.serving.plan import Pool, ServePlan
from planner.serving.replay import problem_of
from planner.serving.space import mesh_of, recipe_of, row_of
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.models import load_model
from planner.specs.serve_problem import ServeProblem
from planner.specs.serving_stack import ServingSoftware
from planner.specs.stack import load_stack
from planner.technique import ServingContext
from planner.techniques.serving.cache_copies.context_parallel_inference import copies
from planner.units import counted

__all__ = ["FIRST_PORT", "GENERATION_TOKENS", "Seat", "ServingTarget", "summary"]

FIRST_PORT = 8000
"""Port of the first replica on a node; the next ones count up from it."""
GENERATION_TOKENS = 1024
"""Tokens of an iteration that the search leaves room for in a pool that only generates."""
_ROOM_TOKENS = 256  # of the context, beside prompt and answer: special tokens and a chat template
_HUB_NAME = re.compile(r"config\.json of ([\w.-]+/[\w.-]+)")


@dataclass(frozen=True, slots=True)
class Seat:
    """One node's share of one replica.

    Attributes:
        node: the node, from 0.
        pool: index of the pool in the plan.
        replica: which one of the pool, from 0.
        rank: which of the replica's nodes this is, from 0.
        port: where the replica's first node answers.
        devices: devices of the node that it takes.
        leader: the replica's first node.
    """

    node: int
    pool: int
    replica: int
    rank: int
    port: int
    devices: tuple[int, ...]
    leader: int


class ServingTarget:
    """A plan with what it names.

    Args:
        plan: the plan.

    Raises:
        SpecError: its model, cluster or stack cannot be found.
    """

    def __init__(self, plan: ServePlan) -> None:
        self.plan = plan
        self.problem: ServeProblem = problem_of(plan)
        self.model = self.problem.model
        taken = {pool.cluster for pool in plan.pools}
        self.clusters = tuple(c for c in self.problem.clusters if c.name in taken) or (self.problem.cluster,)

    def cluster(self, pool: Pool) -> Cluster:
        """The cluster that a pool stands on."""
        return next((c for c in self.clusters if c.name == pool.cluster), self.clusters[0])

    def alike(self, pool: Pool) -> tuple[Pool, ...]:
        """The pools of a pool's role, itself included: several where devices, degrees or budgets of one role differ."""
        return tuple(other for other in self.plan.pools if other.role == pool.role)

    @property
    def unlike(self) -> bool:
        """Whether several pools share a role: replicas that carry more than others."""
        return any(len(self.alike(pool)) > 1 for pool in self.plan.pools)

    def pool_name(self, pool: Pool) -> str:
        """What a pool is called: its role, and its number where several have that role (``prefill-2``)."""
        alike = self.alike(pool)
        number = next(count for count, other in enumerate(alike, start=1) if other is pool)
        return pool.role if len(alike) == 1 else f"{pool.role}-{number}"

    def suffix(self, pool: Pool) -> str:
        """What ends the names of a pool's files: nothing where there is one pool."""
        return "" if pool.role == "aggregated" else f"-{self.pool_name(pool)}"

    def software(self, engine: str, pool: Pool) -> ServingSoftware:
        """An engine's constants on a pool's devices: the plan's stack where it is that engine's, else the shipped one."""
        stack = self.problem.stack if self.plan.stack.startswith(engine) else load_stack(engine)
        found = stack.on_generation(self.cluster(pool).device.generation).serving
        assert found is not None
        return found

    @property
    def checkpoint(self) -> str:
        """The hub's name of the published weights; empty where the model's file does not name them."""
        return published_name(self.model) or (self.plan.model if "/" in self.plan.model else "")

    def draft(self, pool: Pool) -> str:
        """The hub's name of a pool's draft head or model, or the model's own where no name is known."""
        if "draft_head" in pool.knobs:
            return str(pool.knobs["draft_head"])
        name = str(pool.knobs["draft"])
        return published_name(load_model(name)) or name

    @property
    def context_tokens(self) -> int:
        """Longest context that is asked for: prompt, answer and some room; the model's own where answers vary in length."""
        asked = int(self.plan.traffic["isl"]) + int(self.plan.traffic["osl"])
        if self.plan.traffic.get("length_scv", 0.0) > 0.0:
            return self.model.max_seq_len
        return max(min(asked + _ROOM_TOKENS, self.model.max_seq_len), asked)

    def iteration_tokens(self, pool: Pool) -> int:
        """Tokens of the largest iteration of an attention rank, as its memory was reckoned with."""
        tokens = int(pool.knobs.get("chunk_tokens", GENERATION_TOKENS))
        return max(tokens, self.sequences(pool) or 0)

    def sequences(self, pool: Pool) -> int | None:
        """Sequences in one batch of an attention rank; None: the engine's default."""
        found = pool.knobs.get("max_sequences")
        return None if found is None else -(-int(found) // pool.mesh["dp"])

    def cache_parts(self, pool: Pool) -> int:
        """Into how many parts tensor ranks split what they would hold copies of."""
        return int(copies(self.model, _mesh(pool))[0]) if pool.knobs.get("cache_copies") == "dcp" else 1

    def degrees(self, pool: Pool) -> str:
        """A pool's degrees as they are fixed: those above 1, or its single device."""
        shown = [n for n in pool.mesh if n != "etp" or any(block.moe for block in self.model.blocks.values())]
        return " ".join(f"{name}={pool.mesh[name]}" for name in shown if pool.mesh[name] > 1) or "1 device"

    def replicas(self, pool: Pool) -> Replicas:
        """The pool as an engine's rules see it."""
        problem = self.problem
        ctx = ServingContext(
            problem.model,
            self.cluster(pool),
            problem.traffic,
            problem.stack,
            _mesh(pool),
            recipe_of(pool.knobs),
        )
        drafting = problem.speculation is not None and "draft" in pool.knobs
        return Replicas(
            ctx, pool.role, problem.speculation.method if drafting and problem.speculation else ""
        )

    def capacity(self, pool: Pool) -> Capacity:
        """What a device of the pool holds."""
        recipe = recipe_of(pool.knobs)
        mesh = _mesh(pool)
        traffic = self.problem.traffic
        own = replace(self.problem, cluster=self.cluster(pool), others=())
        iterations = iterations_of(own, recipe, mesh, Pricer(own.cluster, own.stack))
        return capacity(iterations, traffic.isl, traffic.osl, float(self.iteration_tokens(pool)))

    # -- machines -----------------------------------------------------------------------------------------------------

    @staticmethod
    def per_node(cluster: Cluster) -> int:
        """Devices of a node.

        Raises:
            ExportError: nodes differ in size.
        """
        sizes = {group.devices_per_node for group in cluster.groups}
        if len(sizes) > 1:
            found = f"nodes of {' and '.join(map(str, sorted(sizes)))} devices"
            raise ExportError(Problem(cluster.name, found, "nodes of one size, as engines start on them"))
        return sizes.pop()

    def size(self, pool: Pool) -> int:
        """Devices of a replica."""
        return pool.devices // pool.replicas

    def span(self, pool: Pool) -> int:
        """Nodes of a replica.

        Raises:
            ExportError: it takes a part of its last node.
        """
        size, per_node = self.size(pool), self.per_node(self.cluster(pool))
        nodes, left = divmod(size, per_node)
        if nodes and left:
            found = f"a replica of {size} devices on nodes of {per_node}"
            raise ExportError(Problem(pool.role, found, "replicas of whole nodes, or within one"))
        return max(nodes, 1)

    @cached_property
    def seats(self) -> tuple[Seat, ...]:
        """Where every replica stands: the largest first, next to each other, none across a node's edge. Nodes of the first
        cluster come first.

        Raises:
            ExportError: they do not fit on a cluster's nodes, or a replica takes a part of its last node.
        """
        found: list[Seat] = []
        for cluster in self.clusters:
            first = found[-1].node + 1 if found else 0
            seats = sorted(self._seats(cluster, first), key=lambda seat: (seat.node, seat.port))
            taken, most = (
                seats[-1].node + 1 - first if seats else 0,
                cluster.devices // self.per_node(cluster),
            )
            if taken > most:
                raise ExportError(
                    Problem(
                        cluster.name,
                        f"replicas stand on {taken} nodes, as none goes across a node's edge",
                        f"{most} nodes",
                        "Plan with degrees that divide a node: serve --fix tp=N.",
                    )
                )
            found += seats
        return tuple(found)

    def _seats(self, cluster: Cluster, node: int) -> Iterator[Seat]:
        """Seats of the pools of one cluster, from this node on."""
        own = [item for item in enumerate(self.plan.pools) if self.cluster(item[1]) is cluster]
        pools = sorted(own, key=lambda item: -self.size(item[1]))
        per_node = self.per_node(cluster)
        free, seated = per_node, 0
        for index, pool in pools:
            size, span = self.size(pool), self.span(pool)
            each = size // span
            for replica in range(pool.replicas):
                if each > free or (span > 1 and free < per_node):
                    node, free, seated = node + 1, per_node, 0
                start = per_node - free
                devices = tuple(range(start, start + each))
                for rank in range(span):
                    yield Seat(node + rank, index, replica, rank, FIRST_PORT + seated, devices, node)
                if span > 1:
                    node, free, seated = node + span, per_node, 0
                else:
                    free, seated = free - each, seated + 1

    @property
    def nodes(self) -> int:
        """Nodes that replicas stand on."""
        return self.seats[-1].node + 1

    @property
    def machines(self) -> dict[str, range]:
        """Nodes of every cluster that a replica stands on, by the cluster's name."""
        found: dict[str, range] = {}
        for seat in self.seats:
            name = self.cluster(self.plan.pools[seat.pool]).name
            first = found[name].start if name in found else seat.node
            found[name] = range(first, seat.node + 1)
        return found


def published_name(model: Model) -> str:
    """The hub's name of a model's published weights; empty where its file does not name them."""
    found = _HUB_NAME.search(model.source)
    return found[1] if found else ""


def summary(plan: ServePlan) -> list[str]:
    """The plan in a few lines: what runs, and what it is predicted to deliver."""
    pools = []
    for pool in plan.pools:
        degrees = " ".join(
            f"{name} {pool.mesh[name]}" for name in ("tp", "pp", "dp", "ep") if pool.mesh[name] > 1
        )
        pools.append(f"{pool.role}: {pool.replicas} x {degrees or '1 device'}, {pool.knobs['weights']}")
    estimate = plan.estimate
    return [
        f"Plan {plan.id}: {plan.model} on {counted(plan.devices, 'device')} of {plan.cluster}; {'; '.join(pools)}.",
        f"Predicted for {plan.traffic['isl']} tokens in, {plan.traffic['osl']} out: "
        f"{estimate.goodput_requests_per_s:.4g} requests/s, {estimate.output_tokens_per_s_per_device:.4g} tokens/s per device, "
        f"first token {estimate.ttft_s['mean'] * 1e3:.4g} ms, then {estimate.tpot_s['mean'] * 1e3:.4g} ms per token (means).",
    ]


def _mesh(pool: Pool) -> Mesh:
    return mesh_of(row_of(pool.mesh))
