"""Where a pipeline's stages run when node groups differ: a group, and the degrees to which work is cut there.

A stage is priced by the engine on its own group's cluster, as a stage of a pipeline on that group alone would be. All stages
see the same micro-batches; each cuts them over its own ranks, so that one with more data-parallel ranks takes fewer sequences on
each. What passes between unlike stages is a message on the link where their groups meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.engine.block_table import tabulate
from planner.engine.pricer import Pricer
from planner.ledger import Array, Collective, Group, Item, Ledger, times
from planner.mesh import Mesh
from planner.operators.baseline import baseline
from planner.pipeline.layout import BOUNDARY
from planner.solve.space import Choice
from planner.specs.cluster import Cluster
from planner.specs.problem import Problem
from planner.technique import SLOTS, Context

__all__ = ["Place", "activation_elements", "hops_s", "of_group"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A node group, and how the work of a stage is cut there.

    Attributes:
        problem: the job on that group alone (:func:`of_group`).
        group: its number in the whole cluster.
        recipe: choices of the slots that shape a block's work.
        row: degrees and micro-batch size of a rank; ``pp`` is that of the whole pipeline.
    """

    problem: Problem
    group: int
    recipe: Mapping[str, Choice]
    row: Mapping[str, float]

    @property
    def ranks(self) -> int:
        """Devices of one stage."""
        return round(self.row["tp"] * self.row["cp"] * self.row["dp"])

    @property
    def micro_batches(self) -> float:
        """Per step, of the global batch."""
        return self.problem.workload.global_batch_size / (self.row["dp"] * self.row["micro_batch_size"])

    def groups(self) -> set[tuple[str, int, int]]:
        """Groups of more than one rank that a device is part of: name, ranks, and how far apart they are."""
        tp, cp, dp, pp, ep, etp = (round(self.row[name]) for name in ("tp", "cp", "dp", "pp", "ep", "etp"))
        every = (("tp", tp, 1), ("cp", cp, tp), ("dp", dp, tp * cp), ("pp", pp, self.ranks), ("ep", ep, etp))
        return {group for group in every if group[1] > 1}

    def context(self, knobs: Mapping[str, Any]) -> Context:
        """What passes see there; the place's own choices come before ``knobs``."""
        own = {slot: choice.value for slot, choice in self.recipe.items()}
        v = {name: np.array([float(value)]) for name, value in self.row.items()}
        mesh = Mesh(v["tp"], v["cp"], v["dp"], v["pp"], v["ep"], v["etp"])
        problem = self.problem
        return Context(
            problem.model, problem.cluster, problem.workload, problem.stack, mesh, v["micro_batch_size"], {**knobs, **own}
        )  # fmt: skip

    def as_dict(self, stages: Sequence[int]) -> dict[str, Any]:
        """The place as JSON fields, with the stages that run there."""
        group = self.problem.cluster.groups[0]
        return {
            "group": self.group,
            "device": group.device.name,
            "mesh": {name: int(self.row[name]) for name in ("tp", "cp", "dp", "ep", "etp")},
            "micro_batch_size": int(self.row["micro_batch_size"]),
            "choices": {slot: choice.value for slot, choice in self.recipe.items()},
            "memory_budget_bytes": self.problem.memory_budget_bytes,
            "stages": list(stages),
        }


def of_group(problem: Problem, group: int) -> Problem:
    """The job on one node group alone; what is fixed of the pipeline's length is left open there."""
    fixed = {name: value for name, value in problem.fixed.items() if name not in _OF_THE_PIPELINE}
    forbidden = tuple(glob for glob in problem.forbidden if glob.partition("=")[0] not in _OF_THE_PIPELINE)
    part = problem.cluster.part(group)
    return replace(problem, cluster=part, fixed=fixed, forbidden=forbidden, layerwise=None)


_OF_THE_PIPELINE = ("pp", "virtual_stages", "pipeline_layout")


def hops_s(cluster: Cluster, edges: Sequence[tuple[Place, Place]]) -> Array:
    """Seconds from every stage to the next one, (stages − 1), the slower of activations down and gradients up.

    A rank receives its own slice of a micro-batch. Where the receiving stage has more ranks than the sending one, a sender serves
    several: it sends ``ranks / senders`` times what one receives.

    Args:
        cluster: all groups, and how they meet.
        edges: the last layer's place of every stage, and the first one's of the next.
    """
    known: dict[tuple[int, int], float] = {}
    found = []
    for one, other in edges:
        for sender, receiver in ((one, other), (other, one)):
            if (id(sender), id(receiver)) not in known:
                known[id(sender), id(receiver)] = _message_s(cluster, sender, receiver)
        found.append(max(known[id(one), id(other)], known[id(other), id(one)]))
    return np.array(found)


def activation_elements(place: Place) -> float:
    """Elements of a micro-batch's residual stream on one rank."""
    axes = _boundary(place).axes
    size = "batch*residual_seq*hidden" + " + batch*encoder_residual_seq*hidden" * bool(
        place.problem.model.encoder_layers
    )
    return float(np.ravel(axes[size])[0])


def _message_s(cluster: Cluster, sender: Place, receiver: Place) -> float:
    """Seconds until a stage has what the one before it sends."""
    part, stack = receiver.problem.cluster, receiver.problem.stack
    whole = _arriving(receiver)
    carried = {id(i): i for i in whole.items if isinstance(i, Collective) and i.kind == "point_to_point"}
    sent, rest = [*carried.values()], [item for item in whole.items if id(item) not in carried]
    spread = max(1.0, receiver.ranks / sender.ranks)
    whole = whole.set_axes(senders_share=np.array([spread]))
    meeting = part
    if sender.group != receiver.group:
        link = cluster.links[sender.group][receiver.group]
        meeting = replace(part, tiers=(replace(link, size=part.devices),))
        sent = [item.but(group=Group("pp", np.array([2.0]), np.ones(1))) for item in sent]
    sent = [item.but(size=times(item.size, "senders_share")) for item in sent]
    total = 0.0
    shares: tuple[tuple[Sequence[Item], Cluster], ...] = ((sent, meeting), (rest, part))
    for items, where in shares:
        table = tabulate(replace(whole, items=tuple(items)), Pricer(where, stack), (BOUNDARY,), 1)
        total += float(table["forward_s"][0, 0])
    return total


@lru_cache(maxsize=1024)
def _arriving(receiver: Place) -> Ledger:
    """What a hop into a place carries in as long a pipeline as its group has devices for, whoever sends it."""
    longest = float(receiver.problem.cluster.devices // receiver.ranks)
    return _boundary(replace(receiver, row={**receiver.row, "pp": longest}))


def _boundary(place: Place) -> Ledger:
    """What a hop into a place carries: the items of the boundary, forward."""
    ctx = place.context({})
    workload = place.problem.workload
    ledger = baseline(
        place.problem.model, batch=ctx.micro_batch_size, seq=float(workload.seq_len), encoder_seq=workload.encoder_seq_len,
        document_len=workload.document_len,
    )  # fmt: skip
    for slot in SLOTS:
        choice = place.recipe.get(slot)
        if choice is not None and choice.technique is not None:
            ledger = choice.technique.apply(ledger, ctx)
    kept: list[Item] = [i for i in ledger.items if i.block == BOUNDARY and i.phase == "forward"]
    return replace(ledger, items=tuple(kept))
