"""The ledgers behind a plan, which its passes make of its rows, and the table that the engine makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from planner.engine.block_table import BlockTable, tabulate
from planner.engine.pricer import Pricer
from planner.ledger import Ledger
from planner.operators.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.pipeline.assignment import Assignment, joined
from planner.pipeline.layout import BOUNDARY
from planner.pipeline.place import Place
from planner.pipeline.transition import CHANGE, transition
from planner.solve.space import DEGREES, Choice, Rows
from planner.specs.problem import Problem
from planner.technique import SLOTS, Context

__all__ = ["Part", "Priced", "price_alike", "price_by_strategy"]


class Part(NamedTuple):
    """The one-row ledger of one strategy, who prices it, and the plan's names of those of its block kinds that the plan holds.

    A stage's blocks run on ``ranks`` devices.
    """

    ledger: Ledger
    names: Mapping[str, str]
    pricer: Pricer
    ranks: int


Priced: TypeAlias = tuple[Sequence[Part], BlockTable]
"""A plan's ledgers, and the table of all of its blocks."""


def price_alike(
    problem: Problem,
    recipe: Mapping[str, Choice],
    knobs: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
) -> list[Priced]:
    """Rows of one recipe, each on its own; the passes run once for all of them."""
    together = Rows({name: np.array([float(row[name]) for row in rows]) for name in DEGREES})
    ctx, kinds, pricer = (
        together.context(problem, knobs),
        _kinds(problem),
        Pricer(problem.cluster, problem.stack),
    )
    ledger = _ledger(problem, recipe, ctx)
    table = tabulate(ledger, pricer, kinds, len(rows))
    found: list[Priced] = []
    for number, row in enumerate(rows):
        at = np.array([number])
        part = Part(
            ledger.take(at, ctx.mesh.take(at).counterpart),
            {kind: kind for kind in kinds},
            pricer,
            Place(problem, 0, {}, row).ranks,
        )
        found.append(([part], table.take(at)))
    return found


def price_by_strategy(
    recipe: Mapping[str, Choice], knobs: Mapping[str, Any], assignment: Assignment, everywhere: Place
) -> Priced:
    """A ledger for each strategy, and one table; ``everywhere`` is where they run unless they have places."""
    columns = assignment.columns(block_order(everywhere.problem.model))
    names = assignment.names(block_order(everywhere.problem.model))
    at = [assignment.places[number] for number in assignment.at] or [everywhere] * len(assignment.strategies)
    pricers = {id(place): Pricer(place.problem.cluster, place.problem.stack) for place in at}
    parts, tables = [], []
    for number, (place, strategy) in enumerate(zip(at, assignment.strategies, strict=True)):
        own = {kind: name for (kind, s), name in zip(columns, names, strict=True) if s == number}
        ctx = place.context({**knobs, **{slot: choice.value for slot, choice in strategy.items()}})
        ledger = _ledger(place.problem, {**recipe, **place.recipe, **strategy}, ctx)
        parts.append(Part(ledger, own, pricers[id(place)], place.ranks))
        tables.append(tabulate(ledger, pricers[id(place)], _kinds(everywhere.problem), 1))
    for number, (a, b) in enumerate(assignment.kinds_of_change(), len(assignment.strategies)):
        one, other = assignment.places[a], assignment.places[b]
        pricer = pricers.setdefault(id(other), Pricer(other.problem.cluster, other.problem.stack))
        ledger = transition(one, other)
        parts.append(Part(ledger, {CHANGE: names[columns.index((CHANGE, number))]}, pricer, other.ranks))
        tables.append(tabulate(ledger, pricer, (CHANGE,), 1))
    return parts, joined(tables, columns, names)


def _kinds(problem: Problem) -> tuple[str, ...]:
    """All block kinds."""
    return (*dict.fromkeys(block_order(problem.model)), EMBEDDING, HEAD, BOUNDARY)


def _ledger(problem: Problem, recipe: Mapping[str, Choice], ctx: Context) -> Ledger:
    """The ledger of a recipe."""
    workload = problem.workload
    ledger = baseline(
        problem.model, batch=ctx.micro_batch_size, seq=float(workload.seq_len), encoder_seq=workload.encoder_seq_len,
        document_len=workload.document_len,
    )  # fmt: skip
    for slot in SLOTS:
        technique = recipe[slot].technique
        if technique is not None:
            ledger = technique.apply(ledger, ctx)
    return ledger
