"""Optimisation problems from JSON files: graphs to recompute, tensors to place, sequences, experts and ranks.

Every reader collects all that is wrong with a file and raises it at once. Names in lists refer to entries that stand
before them, or in another list of the same file; sizes may be text such as ``"80 GiB"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.errors import did_you_mean
from planner.solve.combinatorial.migrations import SCHEDULED
from planner.solve.combinatorial.ranks import Group, RankProblem, pipeline_phases
from planner.solve.combinatorial.recompute import ComputeGraph
from planner.solve.combinatorial.sequences import SequenceProblem
from planner.solve.combinatorial.tiering import MOVES, Kernel, Tensor, Tier, TieringProblem
from planner.specs.reader import Reader, read_file

__all__ = [
    "ExpertProblem",
    "read_compute_graph",
    "read_experts",
    "read_ranks",
    "read_sequences",
    "read_tiers",
]

_MOST = 100_000


def read_compute_graph(path: str) -> ComputeGraph:
    """Nodes with seconds, bytes and what they read; ``boundary`` names the first node of the backward.

    ::

        {"boundary": "b2", "nodes": [{"name": "f1", "time_s": 1e-3, "memory_bytes": "64 MiB"},
                                     {"name": "b2", "time_s": 2e-3, "memory_bytes": 0, "reads": ["f1"]}]}

    Raises:
        SpecError: everything that is wrong with the file.
    """
    reader = Reader(read_file(path), path)
    entries = _some(reader, "nodes")
    names = [entry.text("name") for entry in entries]
    reads = []
    for number, entry in enumerate(entries):
        _fresh(entry, names[number], names[:number])
        reads.append(tuple(sorted(_numbers(entry, "reads", names[:number]))))
    seconds = [entry.number("time_s") for entry in entries]
    sizes = [entry.size("memory_bytes") for entry in entries]
    in_place = frozenset(i for i, entry in enumerate(entries) if entry.boolean("in_place", False))
    start = reader.text("boundary", None)
    if start is not None and start not in names:
        reader.problem("boundary", repr(start), "the name of a node", did_you_mean(str(start), names))
    constant = reader.size("constant_bytes", 0.0)
    _finish(reader, entries)
    boundary = names.index(start) if start is not None else 0
    return ComputeGraph(names, seconds, sizes, reads, in_place, boundary, constant)


def read_tiers(path: str) -> TieringProblem:
    """Tiers from the nearest outwards, tensors, and kernels in order with the tensors that they use.

    ::

        {"moves": "serial",
         "tiers": [{"name": "hbm", "capacity_bytes": "80 GB"},
                   {"name": "dram", "capacity_bytes": "1 TB", "read_bytes_per_s": 50e9, "write_bytes_per_s": 50e9}],
         "tensors": [{"name": "states", "size_bytes": "10 GB", "persists": true}],
         "kernels": [{"name": "update", "time_s": 0.1, "uses": ["states"]}]}

    Raises:
        SpecError: everything that is wrong with the file.
    """
    reader = Reader(read_file(path), path)
    tiers = []
    levels = _some(reader, "tiers")
    for number, entry in enumerate(levels):
        rates = [
            entry.number(f"{way}_bytes_per_s", positive=True) if number else np.inf
            for way in ("read", "write")
        ]
        tiers.append(Tier(entry.text("name"), entry.size("capacity_bytes"), *rates))
    entries = _some(reader, "tensors")
    tensors = [
        Tensor(
            e.text("name"), e.size("size_bytes"), e.boolean("persists", False), e.boolean("constant", False)
        )
        for e in entries
    ]
    names = [tensor.name for tensor in tensors]
    for number, entry in enumerate(entries):
        _fresh(entry, names[number], names[:number])
    steps = _some(reader, "kernels")
    kernels = [Kernel(e.text("name"), e.number("time_s"), tuple(_numbers(e, "uses", names))) for e in steps]
    moves = reader.text("moves", MOVES[0], choices=(*MOVES, SCHEDULED))
    _finish(reader, [*levels, *entries, *steps])
    return TieringProblem(tuple(kernels), tuple(tensors), tuple(tiers), moves)


def read_sequences(path: str) -> SequenceProblem:
    """Buckets of sequences with seconds and bytes for every degree.

    ::

        {"devices": 8, "degrees": [1, 2, 4, 8], "budget_bytes": "60 GB",
         "buckets": [{"length": 4096, "count": 100, "time_s": [4, 2.1, 1.2, 0.7], "memory_bytes": [8e9, 4e9, 2e9, 1e9]}]}

    Raises:
        SpecError: everything that is wrong with the file.
    """
    reader = Reader(read_file(path), path)
    devices = reader.integer("devices", maximum=100_000)
    degrees = tuple(int(d) for d in reader.numbers("degrees"))
    if not degrees or min(degrees) < 1 or len(set(degrees)) < len(degrees) or max(degrees) > devices:
        reader.problem("degrees", repr(list(degrees)), f"different whole numbers from 1 to {devices}")
    budget = reader.size("budget_bytes", np.inf) if reader.has("budget_bytes") else np.inf
    extra = (
        reader.numbers("group_s", [0.0] * len(degrees)) if reader.has("group_s") else (0.0,) * len(degrees)
    )
    entries = _some(reader, "buckets")
    lengths = [entry.integer("length") for entry in entries]
    counts = [entry.integer("count", maximum=_MOST) for entry in entries]
    rows: dict[str, list[Sequence[float]]] = {"time_s": [], "memory_bytes": []}
    for entry in entries:
        for key, table in rows.items():
            values = entry.numbers(key)
            if len(values) != len(degrees) or (values and min(values) < 0.0):
                entry.problem(key, f"{len(values)} numbers", f"one from 0 for each of {len(degrees)} degrees")
                values = (0.0,) * len(degrees)
            table.append(values)
    if len(extra) != len(degrees):
        reader.problem("group_s", f"{len(extra)} numbers", f"one for each of {len(degrees)} degrees")
    packed = reader.boolean("packed", False)
    _finish(reader, entries)
    return SequenceProblem(
        tuple(lengths), tuple(counts), degrees, np.array(rows["time_s"]), np.array(rows["memory_bytes"]), devices, budget,
        tuple(extra), packed,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class ExpertProblem:
    """Loads of one layer's experts, or transitions between the experts of neighbouring layers.

    Attributes:
        devices: how many there are.
        slots: experts that a device can hold; None: an even deal.
        loads: of every expert; empty where transitions are given.
        transitions: per pair of layers, tokens from every expert to every expert of the next layer.
    """

    devices: int
    slots: int | None
    loads: tuple[float, ...]
    transitions: tuple[Any, ...]


def read_experts(path: str) -> ExpertProblem:
    """``{"devices": 8, "loads": […]}`` or ``{"devices": 4, "transitions": [[[…]]]}``.

    Raises:
        SpecError: everything that is wrong with the file.
    """
    reader = Reader(read_file(path), path)
    devices = reader.integer("devices", maximum=_MOST)
    slots = reader.integer("slots", None, maximum=_MOST) if reader.has("slots") else None
    if reader.has("loads") == reader.has("transitions"):
        reader.problem("loads", "both or neither of loads and transitions", "one of them")
    loads = reader.numbers("loads", []) if reader.has("loads") else ()
    if reader.has("loads") and (not loads or min(loads) < 0.0 or not sum(loads)):
        reader.problem("loads", repr(list(loads))[:60], "numbers from 0, not all of them 0")
    tables: list[Any] = []
    if reader.has("transitions"):
        given = reader.data["transitions"]
        reader.ignore("transitions")
        tables = [
            _matrix(reader, f"transitions[{i}]", table)
            for i, table in enumerate(given if isinstance(given, list) else [])
        ]
        if (
            not tables
            or len({table.shape for table in tables}) > 1
            or tables[0].shape[0] != tables[0].shape[1]
        ):
            reader.problem("transitions", "tables of different or uneven shapes", "square tables of one size")
    _finish(reader, [])
    return ExpertProblem(devices, slots, tuple(loads), tuple(tables))


def read_ranks(path: str) -> RankProblem:
    """Bandwidths between nodes, and a pipeline's messages or groups of ranks, phase by phase.

    ::

        {"bytes_per_s": [[0, 25e9], [25e9, 0]], "latency_s": 5e-6,
         "pipeline": {"stages": 2, "replicas": 1, "activation_bytes": 1e8, "gradient_bytes": 4e9, "micro_batches": 8}}

    or ``"phases": [[{"ranks": [0, 1], "bytes": 1e9, "kind": "ring"}]]``.

    Raises:
        SpecError: everything that is wrong with the file.
    """
    reader = Reader(read_file(path), path)
    matrix = _matrix(reader, "bytes_per_s", reader.data.get("bytes_per_s"))
    reader.ignore("bytes_per_s")
    latency = reader.number("latency_s", 0.0)
    if reader.has("pipeline") == reader.has("phases"):
        reader.problem("pipeline", "both or neither of pipeline and phases", "one of them")
    phases: tuple[tuple[Group, ...], ...] = ()
    entries: list[Reader] = []
    if reader.has("pipeline"):
        table = reader.table("pipeline")
        entries.append(table)
        stages, replicas = (table.integer(key, maximum=1000) for key in ("stages", "replicas"))
        activation, gradient = (table.size(f"{what}_bytes") for what in ("activation", "gradient"))
        phases = pipeline_phases(stages, replicas, activation, gradient, table.integer("micro_batches", 1))
    elif reader.has("phases"):
        given = reader.data["phases"]
        reader.ignore("phases")
        for number, phase in enumerate(given if isinstance(given, list) else []):
            inner = Reader({"groups": phase}, reader.where, f"phases[{number}]", reader.problems)
            groups = inner.tables("groups")
            entries += groups
            phases = (*phases, tuple(_group(entry) for entry in groups))
    _finish(reader, entries)
    return RankProblem(matrix, phases, latency)


# -- details -----------------------------------------------------------------------------------------------------------------


def _group(entry: Reader) -> Group:
    ranks = entry.numbers("ranks")
    if len(ranks) < 2 or len(set(ranks)) < len(ranks) or any(rank < 0 or rank != int(rank) for rank in ranks):
        entry.problem("ranks", repr(list(ranks))[:60], "at least two different whole numbers from 0")
        ranks = (0, 1)
    kind = entry.text("kind", "ring", choices=("ring", "chain"))
    return Group(tuple(int(rank) for rank in ranks), entry.size("bytes"), kind)


def _some(reader: Reader, key: str) -> list[Reader]:
    """The tables of a list that may not be empty."""
    entries = reader.tables(key)
    if not 0 < len(entries) <= _MOST:
        reader.problem(key, f"{len(entries)} entries", f"1 to {_MOST:,}")
    return entries


def _fresh(entry: Reader, name: str, before: Sequence[str]) -> None:
    if name in before:
        entry.problem("name", repr(name), "a name of its own")


def _numbers(entry: Reader, key: str, names: Sequence[str]) -> list[int]:
    """Where the names of a list stand among others."""
    given = entry.texts(key, []) if entry.has(key) else ()
    for name in given:
        if name not in names:
            entry.problem(key, repr(name), "the name of an entry before this one", did_you_mean(name, names))
    return [names.index(name) for name in dict.fromkeys(given) if name in names]


def _matrix(reader: Reader, key: str, given: Any) -> Any:
    """A table of numbers from 0 as an array; of one zero where it is none."""
    try:
        found = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all() or found.min() < 0.0:
        reader.problem(key, "is no table of finite numbers from 0", "rows of equally many numbers")
        return np.zeros((1, 1))
    return found


def _finish(reader: Reader, entries: Sequence[Reader]) -> None:
    for entry in entries:
        entry.finish()
    reader.finish()
    reader.raise_if_any()
