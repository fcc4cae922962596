"""The candidates of one pool: rows of a recipe that techniques and the engine allow and whose weights fit, and how they went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.engine.pricer import Pricer
from planner.ledger import Array
from planner.mesh import Mesh
from planner.serving.capacity import Capacity, capacity
from planner.serving.front import Curve
from planner.serving.iteration import Iterations, serving_choices
from planner.serving.launcher import Replicas
from planner.serving.space import ServeSpace, mesh_of, size_of
from planner.serving.speculation import Speculating
from planner.specs.serve_problem import ServeProblem
from planner.technique import ServingContext
from planner.units import counted

__all__ = ["Account", "Candidates", "candidates", "iterations_of", "rules_of"]


@dataclass(slots=True)
class Account:
    """How the candidates went: ``candidates = scored + excluded + rejected``; ``nearest`` holds what failed by least.

    ``curves`` are the loads that were priced on the way; the best found may lie below the best possible value by a ``gap``,
    a fraction of that.
    """

    candidates: int = 0
    scored: int = 0
    repriced: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    gap: float = 0.0
    nearest: dict[str, tuple[float, str]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def miss(self, limit: str, ratio: float, text: str) -> None:
        """Remembers the candidate that came closest to a limit: ``ratio`` is found over allowed."""
        if limit not in self.nearest or ratio < self.nearest[limit][0]:
            self.nearest[limit] = (ratio, text)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Rows of one recipe: meshes and budgets that are valid and fit."""

    recipe: Mapping[str, str]
    rows: NDArray[Any]
    chunks: Array
    capacity: Capacity
    most: Array  # requests in flight per replica

    @property
    def size(self) -> Array:
        """Devices of a replica."""
        return size_of(self.rows)

    def take(self, index: NDArray[np.intp]) -> Candidates:
        """Some rows."""
        return Candidates(
            self.recipe, self.rows[index], self.chunks[index], self.capacity.take(index), self.most[index]
        )


def iterations_of(problem: ServeProblem, recipe: Mapping[str, str], mesh: Mesh, pricer: Pricer) -> Iterations:
    """The iterations of a recipe on meshes."""
    ctx = ServingContext(problem.model, problem.cluster, problem.traffic, problem.stack, mesh, recipe)
    if problem.speculation is not None and "draft_tokens" in recipe:
        return Speculating(ctx, pricer, problem.speculation, int(recipe["draft_tokens"]))
    return Iterations(ctx, pricer)


def candidates(
    problem: ServeProblem,
    space: ServeSpace,
    recipe: Mapping[str, str],
    pricer: Pricer,
    account: Account,
    traffic_osl: float | None = None,
) -> Candidates | None:
    """Valid rows of a recipe whose weights fit; None where there is none. The others are counted with their reason."""
    meshes = np.repeat(space.meshes, len(space.chunks), axis=0)
    chunks = np.tile(np.array(space.chunks, dtype=np.float64), len(space.meshes))
    ctx = ServingContext(
        problem.model, problem.cluster, problem.traffic, problem.stack, mesh_of(meshes), recipe
    )
    alive = np.ones(len(meshes), dtype=bool)
    for technique in serving_choices(recipe):  # where a choice does nothing, another recipe is the same
        if technique.active is not None and technique.slot not in space.fixed:
            alive &= technique.active(ctx)
    account.candidates += int(alive.sum())
    for reason, ok in rules_of(problem, space.role, ctx):
        broken = alive & ~np.broadcast_to(ok, alive.shape)
        if broken.any():
            account.rejected[reason] += int(broken.sum())
            alive &= ~broken
    if not alive.any():
        return None
    meshes, chunks = meshes[alive], chunks[alive]
    iterations = iterations_of(problem, recipe, mesh_of(meshes), pricer)
    traffic = problem.traffic
    held = capacity(
        iterations, traffic.isl, traffic.osl if traffic_osl is None else traffic_osl, chunks,
        space.fixed.get("max_sequences"),
    )  # fmt: skip
    fits = held.sequences >= 1.0
    account.rejected["device memory"] += int((~fits).sum())
    for index in np.flatnonzero(~fits)[:2000]:
        needed = held.weights_bytes[index] + held.activation_bytes[index] + held.reserved_bytes
        needed += held.request_bytes[index] / float(iterations.software.free_fraction)
        budget = float(problem.stack.serving.memory_fraction) * float(problem.cluster.device.memory_bytes)  # type: ignore[union-attr]
        account.miss(
            "memory",
            needed / budget,
            f"{recipe['weights']} weights on {counted(int(size_of(meshes[index])), 'device')}",
        )
    if not fits.any():
        return None
    return Candidates(recipe, meshes, chunks, held, held.sequences).take(np.flatnonzero(fits))


def rules_of(
    problem: ServeProblem, role: str, ctx: ServingContext
) -> Iterator[tuple[str, NDArray[np.bool_] | bool]]:
    """What techniques, and the engine where one is given, say of rows."""
    for technique in serving_choices(ctx.knobs):
        yield from ((check.reason, check.ok) for check in technique.valid(ctx))
    if problem.launcher is not None:
        told = problem.speculation
        draft = told.method if told is not None and "draft_tokens" in ctx.knobs else ""
        for rule in problem.launcher.rules(Replicas(ctx, role, draft)):
            yield f"{problem.launcher.name}: {rule.reason}", rule.ok
