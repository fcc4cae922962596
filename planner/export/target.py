"""What every exporter needs of a plan: its specifications, its recipe as the launcher's rules read it, and its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np

from planner.assignment import UNEVEN
from planner.errors import ExportError, Problem
from planner.export.layers import meshes_of_ends, of_ends
from planner.mesh import Mesh
from planner.plan import Plan
from planner.specs.cluster import Cluster
from planner.specs.hardware import load_cluster
from planner.specs.model import Model
from planner.specs.models import load_model
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, Context, Launcher, off
from planner.units import format_bytes

__all__ = ["Target", "recomputed_layers", "summary"]

_DEGREES = ("tp", "cp", "pp", "dp", "ep", "etp")
# Slots that do nothing on a degree of 1, which then need no word of the launcher's.
_ACTS_ON = {"sequence_parallel": "tp", "tensor_overlap": "tp", "expert_overlap": "ep", "context": "cp"}


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A plan with the model and the cluster that it names.

    Attributes:
        knobs: the plan's choices as text, as techniques and launchers read them.
    """

    plan: Plan
    model: Model
    cluster: Cluster
    knobs: Mapping[str, str]

    @staticmethod
    def of(plan: Plan, model: Model | None = None, cluster: Cluster | None = None) -> Target:
        """The plan with its specifications; loaded by name unless they are given.

        Raises:
            SpecError: the plan names a model or a cluster that cannot be found.
        """
        # A plan from before a slot existed does without it.
        stated = {name: str(value).lower() for name, value in plan.knobs.items()}
        knobs = {slot: off(slot) for slot in SLOTS} | stated
        knobs = _without_idle(knobs, plan.mesh)
        return Target(plan, model or load_model(plan.model), cluster or load_cluster(plan.cluster), knobs)

    @property
    def workload(self) -> TrainWorkload:
        """The plan's job."""
        known = {field.name for field in fields(TrainWorkload)}
        values = {name: value for name, value in self.plan.workload.items() if name in known}
        return TrainWorkload(**{**values, "precisions": tuple(values.get("precisions", ("bf16",)))})

    def context(self) -> Context:
        """The one row that launchers judge."""
        return self._context(self.plan.mesh, self.plan.knobs["micro_batch_size"], self.knobs)

    def _context(self, mesh: Mapping[str, int], micro_batch_size: int, knobs: Mapping[str, str]) -> Context:
        tp, cp, dp, ep, etp = (np.array([float(mesh[name])]) for name in ("tp", "cp", "dp", "ep", "etp"))
        pp = np.array([float(self.plan.mesh["pp"])])
        batch = np.array([float(micro_batch_size)])
        stack = load_stack(self.plan.stack)
        return Context(
            self.model, self.cluster, self.workload, stack, Mesh(tp, cp, dp, pp, ep, etp), batch, knobs
        )

    def refused(self, launcher: Launcher) -> list[Problem]:
        """Every feature of the plan that the launcher cannot express, and every rule of the launcher that it breaks."""
        where = f"--to {launcher.name}"
        problems = [
            Problem(where, f"cannot express {slot}={self.knobs[slot]}")
            for slot in SLOTS
            if slot in self.knobs and not launcher.allows(slot, self.knobs[slot])
        ]
        layout = self.knobs.get("pipeline_layout", "even")
        if ("balanced" if layout == UNEVEN else layout) not in launcher.layouts:
            problems.append(Problem(where, f"cannot express pipeline_layout={layout}"))
        problems += [*self.differing(where, launcher), *self.placed(where, launcher)]
        reasons = [
            check.reason for ctx in self.contexts() for check in launcher.valid(ctx) if not np.all(check.ok)
        ]
        return problems + [Problem(where, reason) for reason in dict.fromkeys(reasons)]

    def contexts(self) -> Iterator[Context]:
        """What launchers judge: one row for every strategy that layers have, with the degrees of its layers."""
        layerwise = self.plan.layerwise
        if layerwise is None:
            yield self.context()
            return
        for number, strategy in enumerate(layerwise["strategies"]):
            own = {slot: str(value) for slot, value in strategy.items()}
            if not self.plan.places:
                yield replace(self.context(), knobs={**self.knobs, **own})
                continue
            place = self.plan.places[layerwise["at"][number]]
            chosen = {slot: str(value).lower() for slot, value in place["choices"].items()}
            knobs = _without_idle({**self.knobs, **chosen, **own}, place["mesh"])
            yield self._context(place["mesh"], place["micro_batch_size"], knobs)

    def differing(self, where: str, launcher: Launcher | None = None) -> Iterator[Problem]:
        """Choices that differ between layers, but for those in which a launcher lets them.

        How many of each stage's first layers are recomputed in full may differ for all launchers.
        """
        if self.plan.layerwise is None:
            return
        strategies = self.plan.layerwise["strategies"]
        for slot in strategies[0]:
            values = list(dict.fromkeys(str(strategy[slot]) for strategy in strategies))
            allowed = launcher.side_by_side(slot, values) if launcher is not None else len(values) == 1
            blocks = slot == "recompute" and recomputed_layers(self.plan) is not None
            if launcher is not None and slot in launcher.alike_at_ends:
                ends = of_ends(self.plan, slot)
                if ends[0] != ends[1]:
                    yield Problem(
                        where,
                        f"cannot express {slot} that differs between embedding and head ({', '.join(ends)})",
                    )
            if not (allowed or blocks):
                yield Problem(
                    where, f"cannot express {slot} that differs between layers ({', '.join(values)})"
                )

    def _matters(self, slot: str, ways: Sequence[Mapping[str, object]]) -> bool:
        """Whether a choice differs between places whose degrees make use of it."""
        degree = _ACTS_ON.get(slot)
        return len({way[slot] for way in ways if degree is None or way[degree] != 1}) > 1

    def placed(self, where: str, launcher: Launcher | None = None) -> Iterator[Problem]:
        """Stages on node groups, layers with degrees of their own: one mesh for all of them, and ranks in the order of the nodes,
        are what most launchers start."""
        places = self.plan.places
        own = launcher is not None and launcher.own_degrees and len(self.cluster.groups) == 1
        ways = []
        for place in places:
            chosen = {slot: str(value).lower() for slot, value in place["choices"].items()}
            ways.append({**place["mesh"], "micro_batch_size": place["micro_batch_size"], **chosen})
        differ = [name for name in (ways[0] if ways else ()) if len({str(way[name]) for way in ways}) > 1]
        if own:
            differ = [name for name in differ if name in SLOTS and self._matters(name, ways)]
            ends = [(mesh["tp"], mesh["cp"]) for mesh in meshes_of_ends(self.plan)]
            if ends[0] != ends[1]:
                yield Problem(where, "cannot express degrees that differ between embedding and head")
        for name in differ:
            values = ", ".join(str(way[name]) for way in ways)
            yield Problem(where, f"cannot express {name} that differs between stages ({values})")
        order = [place["group"] for place in places]
        if order != sorted(order):
            names = "+".join(self.cluster.parts[group].name for group in order)
            expected = "node groups listed in the order of the pipeline"
            yield Problem(
                where,
                f"the pipeline takes the node groups as {names}",
                expected,
                "List them so in --cluster.",
            )

    def nodes(self) -> tuple[int, int]:
        """Nodes, and devices per node.

        Raises:
            ExportError: nodes differ in size, or the plan does not fill whole nodes.
        """
        sizes = {group.devices_per_node for group in self.cluster.groups}
        if len(sizes) > 1:
            found = f"nodes of {' and '.join(map(str, sorted(sizes)))} devices"
            raise ExportError(Problem(self.cluster.name, found, "nodes of one size, as launchers start them"))
        per_node = min(sizes.pop(), self.plan.devices)
        nodes, left = divmod(self.plan.devices, per_node)
        if left:
            found = f"{self.plan.devices} devices of nodes of {per_node}"
            raise ExportError(Problem(self.cluster.name, found, "whole nodes, as launchers start them"))
        return nodes, per_node


def recomputed_layers(plan: Plan) -> int | None:
    """How many layers of every virtual stage, its first ones (all, where it has fewer), a layer-wise plan recomputes in full.

    None where stages differ in it, or layers in anything else.
    """
    if plan.layerwise is None:
        return None
    choices = [strategy["recompute"] for strategy in plan.layerwise["strategies"]]
    if not {"none", "full"} >= set(choices):
        return None
    again = [[(choices[s] == "full", n) for s, n in runs] for runs in plan.layerwise["stages"]]
    if any(not full and later for runs in again for (full, _), (later, _) in pairwise(runs)):
        return None  # a recomputed layer behind one that is not
    counts = [sum(n for full, n in runs if full) for runs in again]
    most = max(counts, default=0)
    return (
        most
        if all(n in (most, sum(k for _, k in runs)) for n, runs in zip(counts, again, strict=True))
        else None
    )


def summary(plan: Plan) -> list[str]:
    """The plan in two lines: what runs where, and what it is predicted to cost."""
    degrees = " · ".join(f"{name} {plan.mesh[name]}" for name in _DEGREES)
    estimate = plan.estimate
    tokens = f"{estimate.tokens_per_s_per_device:,.0f}"
    return [
        f"Plan {plan.id}: {plan.model} on {plan.cluster}, {plan.devices} devices ({degrees}).",
        f"Predicted: {estimate.step_time_s:.4g} s per step, {tokens} tokens/s per device, "
        f"{format_bytes(estimate.memory_bytes['peak'])} per device.",
    ]


def _without_idle(knobs: Mapping[str, str], mesh: Mapping[str, int]) -> dict[str, str]:
    """The knobs, with those off that do nothing on these degrees."""
    idle = {
        slot: "p2p" if slot == "context" else off(slot) for slot, name in _ACTS_ON.items() if mesh[name] == 1
    }
    return {**knobs, **idle}
