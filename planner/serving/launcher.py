"""What an engine can run: rules of the tool, not of physics, over the replicas of a search's rows or of one plan's pool.

An engine's own are in :mod:`planner.export.serving.rules`. The search keeps to them (``ServeProblem.launcher``), an export and
``planner check`` hold plans against them: whatever a search for an engine returns can be exported to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.ledger import Array
from planner.mesh import Mesh
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.technique import ServingContext

__all__ = ["Replicas", "Rule", "ServingLauncher", "nodes_taken", "seated", "whole_nodes"]


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule over rows: where ``ok`` is false, replicas are refused for ``reason``; ``expected`` would run."""

    reason: str
    expected: str
    ok: NDArray[np.bool_] | bool


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """Kinds of replicas, one per row, as rules see them.

    Attributes:
        ctx: model, machines, traffic, meshes and the choices of every slot.
        role: ``aggregated``, ``prefill`` or ``decode``.
        draft: who drafts tokens (a method of :class:`~planner.specs.speculation.Speculation`); empty: nobody.
    """

    ctx: ServingContext
    role: str
    draft: str = ""

    @property
    def ranks(self) -> Array:
        """Ranks of a stage."""
        return np.asarray(self.ctx.mesh.tp * self.ctx.mesh.cp * self.ctx.mesh.dp)


def _none(prefill: Mesh, decode: Mesh) -> Iterable[Rule]:
    return ()


def _nothing(slot: str, value: str, model: Model) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class ServingLauncher:
    """An engine's abilities.

    Attributes:
        name: as ``--to`` takes it.
        replicas: its rules over replicas of one pool.
        pairs: its rules over a prefill and a decode pool: arrays of both meshes broadcast against each other.
        choices: slot → values that it has words for; of slots that are left out, all.
        native: whether it works with a slot's value for a model by itself: a search for it tries that without being asked.
    """

    name: str
    replicas: Callable[[Replicas], Iterable[Rule]]
    pairs: Callable[[Mesh, Mesh], Iterable[Rule]] = _none
    choices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    native: Callable[[str, str, Model], bool] = _nothing

    def allows(self, slot: str, value: str) -> bool:
        """Whether it has words for a slot's value."""
        return value in self.choices.get(slot, (value,))

    def rules(self, pool: Replicas) -> Iterator[Rule]:
        """Its own rules, and those of every engine: heads that ranks share evenly, nodes that replicas fill or share."""
        yield from self.replicas(pool)
        yield whole_nodes(pool.ctx.cluster, pool.ranks * pool.ctx.mesh.pp)


def whole_nodes(cluster: Cluster, size: Array) -> Rule:
    """Replicas of ``size`` devices lie within a node, or take whole ones."""
    per_node = {group.devices_per_node for group in cluster.groups}
    if len(per_node) > 1:
        named = " and ".join(map(str, sorted(per_node)))
        return Rule(f"nodes of {named} devices", "nodes of one size, as engines start on them", False)
    each = float(per_node.pop())
    reason = f"a replica takes a part of its last node: nodes of {each:g}"
    return Rule(reason, "replicas of whole nodes, or within one", (size <= each) | (size % each == 0))


def nodes_taken(per_node: float, sizes: Array, counts: Array) -> Array:
    """Nodes on which replicas of several sizes stand, none across a node's edge, the largest first, each next to the last.

    Args:
        per_node: devices of a node.
        sizes, counts: of every pool (rows) in every case (columns); sizes divide a node's edge or are multiples of it.

    >>> nodes_taken(8.0, np.array([[2.0], [4.0]]), np.array([[3.0], [2.0]])).tolist()  # 4 + 4, then 2 + 2 + 2
    [2.0]
    >>> nodes_taken(72.0, np.array([[16.0]]), np.array([[9.0]])).tolist()  # four of 16 on 72
    [3.0]
    """
    order = np.argsort(-sizes, axis=0, kind="stable")
    nodes = free = np.zeros(sizes.shape[1])
    for size, count in zip(
        np.take_along_axis(sizes, order, 0), np.take_along_axis(counts, order, 0), strict=True
    ):
        beside = np.minimum(count, np.floor(free / size))
        rest, each = count - beside, np.maximum(np.floor(per_node / size), 1.0)
        more = np.ceil(rest / each) * np.maximum(size / per_node, 1.0)
        last = rest - np.maximum(np.ceil(rest / each) - 1.0, 0.0) * each
        left = np.where(size >= per_node, 0.0, per_node - last * size)
        free = np.where(rest > 0.0, left, free - beside * size)
        nodes = nodes + np.ceil(more)
    return np.asarray(nodes)


def seated(cluster: Cluster, size: Array) -> Array:
    """Replicas of ``size`` devices that stand on a cluster's nodes, none across a node's edge.

    >>> from planner.specs.cluster_file import load_cluster
    >>> seated(load_cluster("h100-sxm:2x8"), np.array([2.0, 3.0, 8.0, 16.0])).tolist()
    [8.0, 4.0, 2.0, 1.0]
    """
    found = np.zeros_like(size)
    for group in cluster.groups:
        each = float(group.devices_per_node)
        inside = np.floor(each / size) * group.nodes
        found = found + np.where(size <= each, inside, np.floor(group.nodes / np.ceil(size / each)))
    return np.asarray(found)
