"""Which layers take which strategy, and the block table that prices it.

A block kind under a strategy is a block kind of its own: the table of a layer-wise plan has one column for each (kind,
strategy) that is in use, and a stage is a vector of counts over those. Everything behind the table (stages, schedule, memory)
then knows nothing of strategies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, TypeAlias

import numpy as np

from planner.engine.block_table import BlockTable
from planner.errors import InvalidPlan, SpecError
from planner.errors import Problem as Fault
from planner.ledger import Array
from planner.operators.baseline import EMBEDDING, HEAD
from planner.pipeline.layout import BOUNDARY, Layout, layout_name, layout_of
from planner.pipeline.place import Place, of_group
from planner.pipeline.transition import CHANGE
from planner.solve.space import Choice
from planner.specs.problem import Problem
from planner.technique import ADDITIVE_SLOTS, discover, off

__all__ = ["Assignment", "Runs", "completed", "group_of", "joined", "label", "read_assignment"]

Runs: TypeAlias = tuple[
    tuple[int, int], ...
]  # (strategy, layers) of one virtual stage, in the order of its layers


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """A strategy for every layer, and for what stands before and behind them.

    Attributes:
        strategies: additive choices by slot (all but the schedule); what is common to all layers is the plan's recipe.
        stages: runs of layers under one strategy, per virtual stage.
        embedding, head: their strategies.
        places: how work is cut, and where, if that differs between stages or layers; then every strategy has one of them.
        at: the place of every strategy, by its number.
    """

    strategies: tuple[Mapping[str, Choice], ...]
    stages: tuple[Runs, ...]
    embedding: int
    head: int
    places: tuple[Place, ...] = ()
    at: tuple[int, ...] = ()

    def stage_places(self) -> list[list[Place]]:
        """The places of every stage in the order of its layers, embedding and head included; none twice in a row."""
        return [[self.places[number] for number in numbers] for numbers in _place_numbers(self)]

    def changes(self) -> list[list[tuple[int, int]]]:
        """Numbers of the places on either side of every change inside a virtual stage."""
        return [list(pairwise(numbers)) for numbers in _place_numbers(self)]

    def columns(self, order: Sequence[str]) -> list[tuple[str, int]]:
        """(kind, strategy) of every column of the table, in order; ``order`` is the model's layers.

        Changes between places follow the layers, numbered on from the strategies.
        """
        layers = (pair for stage in self.of_layers(order) for pair in stage)
        changes = ((CHANGE, len(self.strategies) + n) for n in range(len(self.kinds_of_change())))
        return [
            *dict.fromkeys(layers), *changes, (EMBEDDING, self.embedding), (HEAD, self.head), (BOUNDARY, 0),
        ]  # fmt: skip

    def kinds_of_change(self) -> list[tuple[int, int]]:
        """Every pair of places between which layers change, once."""
        return list(dict.fromkeys(pair for stage in self.changes() for pair in stage))

    def of_layers(self, order: Sequence[str]) -> list[list[tuple[str, int]]]:
        """(kind, strategy) of every layer, per virtual stage."""
        kinds = iter(order)
        return [[(next(kinds), s) for s, n in runs for _ in range(n)] for runs in self.stages]

    def names(self, order: Sequence[str]) -> list[str]:
        """The columns' names: a kind, with its strategy where there are several."""
        several = len(self.strategies) > 1
        changes = self.kinds_of_change()
        found = []
        for kind, s in self.columns(order):
            if kind == CHANGE:
                one, other = changes[s - len(self.strategies)]
                found.append(f"{CHANGE}·{one}→{other}")
            else:
                plain = not several or kind in (EMBEDDING, HEAD, BOUNDARY)
                found.append(kind if plain else f"{kind}·{label(s)}")
        return found

    def stage_layers(self) -> tuple[int, ...]:
        """Layers of every virtual stage."""
        return tuple(sum(n for _, n in runs) for runs in self.stages)

    def layout(self, order: Sequence[str], pp: int) -> Layout:
        """Counts per virtual stage over the columns."""
        columns = self.columns(order)
        position = {column: index for index, column in enumerate(columns)}
        counts = np.zeros((len(self.stages), len(columns)))
        for stage, layers in enumerate(self.of_layers(order)):
            for column in layers:
                counts[stage, position[column]] += 1.0
        kinds = {pair: len(self.strategies) + n for n, pair in enumerate(self.kinds_of_change())}
        for stage, changes in enumerate(self.changes()):
            for pair in changes:
                counts[stage, position[CHANGE, kinds[pair]]] += 1.0
        counts[0, -3] = counts[-1, -2] = 1.0
        return layout_of(counts, pp, len(self.stages) // pp, layout_name(self.stage_layers()))


@lru_cache(maxsize=256)
def _place_numbers(assignment: Assignment) -> list[list[int]]:
    """Numbers of the places of every stage in the order of its layers, embedding and head included; none twice in a row."""
    if not assignment.places:
        return [[] for _ in assignment.stages]
    found = []
    for stage, runs in enumerate(assignment.stages):
        strategies = [s for s, _ in runs]
        strategies = [assignment.embedding] * (stage == 0) + strategies
        strategies += [assignment.head] * (stage == len(assignment.stages) - 1)
        found.append([number for number, _ in groupby(assignment.at[s] for s in strategies)])
    return found


def completed(layerwise: Mapping[str, Any], problem: Problem, common: Mapping[str, str]) -> Mapping[str, Any]:
    """A plan's ``layerwise`` field, whose places say all that they may leave open.

    The data degree is what remains of the devices, the size of micro-batches the one that makes as many of them as the problem's
    knobs do, and choices are those that are common to all places.

    Raises:
        InvalidPlan: devices or micro-batches do not divide.
    """
    stages, devices = len(layerwise["stages"]), problem.cluster.devices
    knobs = {name: int(str(problem.fixed.get(name, 1))) for name in ("tp", "cp", "pp", "micro_batch_size")}
    places, faults = [], []
    for place in layerwise["places"]:
        mesh, choices = dict(place["mesh"]), {**common, **place["choices"]}
        size = place.get("micro_batch_size")
        if "dp" not in mesh:
            mesh["dp"], left = divmod(devices, stages * mesh["tp"] * mesh["cp"])
            if left or not mesh["dp"]:
                found = f"devices do not divide among tp · cp · pp = {stages * mesh['tp'] * mesh['cp']}"
                faults.append(Fault("plan", f"{found}: there are {devices:,}", "degrees that divide them"))
        if size is None:
            ranks = knobs["tp"] * knobs["cp"] * knobs["pp"]
            # All places see the same sequences: those of a micro-batch, on all ranks of a stage.
            size, left = divmod(devices * knobs["micro_batch_size"], ranks * max(mesh["dp"], 1))
            if left or not size:
                found = f"a micro-batch is no whole number of sequences on {mesh['dp']} replicas"
                faults.append(Fault("plan", found, "as many sequences, or a multiple"))
        places.append({**place, "mesh": mesh, "micro_batch_size": size, "choices": choices})
    if faults:
        raise InvalidPlan(faults)
    return {**layerwise, "places": places}


def read_assignment(data: Mapping[str, Any], problem: Problem) -> Assignment:
    """The assignment that a plan's ``layerwise`` field describes.

    Raises:
        SpecError: no technique serves a choice, or the cluster has no such node group.
    """
    strategies = [
        {slot: _choice(slot, value) for slot, value in strategy.items()} for strategy in data["strategies"]
    ]
    stages = tuple(tuple((int(s), int(n)) for s, n in runs) for runs in data["stages"])
    places = tuple(_place(place, problem, len(stages)) for place in data.get("places", ()))
    at = tuple(int(number) for number in data.get("at", ()))
    return Assignment(tuple(strategies), stages, int(data["embedding"]), int(data["head"]), places, at)


def group_of(place: Mapping[str, Any], problem: Problem) -> int:
    """The number of a place's node group.

    Raises:
        SpecError: the cluster has no such group.
    """
    group = int(place["group"])
    if not 0 <= group < len(problem.cluster.groups):
        found = f"node group {group} of {problem.cluster.name}"
        raise SpecError(Fault("plan: layerwise.places", found, f"one of {len(problem.cluster.groups)}"))
    return group


def _place(data: Mapping[str, Any], problem: Problem, stages: int) -> Place:
    group = group_of(data, problem)
    recipe = {slot: _choice(slot, value, "places") for slot, value in data["choices"].items()}
    row = {**data["mesh"], "pp": stages, "micro_batch_size": data["micro_batch_size"]}
    return Place(of_group(problem, group), group, recipe, {name: float(n) for name, n in row.items()})


def _choice(slot: str, value: Any, where: str = "strategies") -> Choice:
    text, fits = str(value).lower(), (slot in ADDITIVE_SLOTS) == (where == "strategies")
    for technique in discover("training").values():
        if technique.slot == slot and fits and text in technique.choices:
            return Choice(text, technique)
    if fits and text == off(slot):
        return Choice(text, None)
    kind = "an additive slot" if where == "strategies" else "a slot before these"
    raise SpecError(Fault(f"plan: layerwise.{where}: {slot}", repr(value), f"a choice of {kind}"))


def label(strategy: int) -> str:
    """A strategy's letter.

    >>> label(0), label(25), label(26)
    ('A', 'Z', 'A1')
    """
    turn, letter = divmod(strategy, 26)
    return chr(ord("A") + letter) + (str(turn) if turn else "")


def joined(
    tables: Sequence[BlockTable], columns: Sequence[tuple[str, int]], names: Sequence[str]
) -> BlockTable:
    """One table of some kinds of several: column ``(kind, i)`` is the i-th table's, under a name of its own."""
    values: list[Array] = [tables[i].values[:, [tables[i].kinds.index(kind)]] for kind, i in columns]
    return BlockTable(tuple(names), np.concatenate(values, axis=1), tables[0].fields)
