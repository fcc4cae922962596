"""What every exporter needs of a plan: its specifications, its recipe as the launcher's rules read it, and its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from planner.errors import ExportError, Problem
from planner.export.layers import of_ends, ways_of_ends, ways_of_layers
from planner.mesh import Mesh
from planner.plans.plan import Plan
from planner.specs.cluster import Cluster
from planner.specs.hardware import load_cluster
from planner.specs.model import Model
from planner.specs.models import load_model
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, Check, Context, Launcher, off
from planner.units import counted, format_bytes

__all__ = ["Target", "broken", "recomputed_layers", "summary"]

_DEGREES = ("tp", "cp", "pp", "dp", "ep", "etp")


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
        knobs = _effective(knobs, plan.mesh)
        return Target(plan, model or load_model(plan.model), cluster or load_cluster(plan.cluster), knobs)

    @property
    def workload(self) -> TrainWorkload:
        """The plan's job."""
        known = {field.name for field in fields(TrainWorkload)}
        values = {name: value for name, value in self.plan.workload.items() if name in known}
        return TrainWorkload(**{**values, "precisions": tuple(values.get("precisions", ("bf16",)))})

    @property
    def layers_differ(self) -> bool:
        """Whether layers have more than one strategy, or more than one mesh."""
        return self.plan.layerwise is not None and len(self.plan.layerwise["strategies"]) > 1

    def context(self) -> Context:
        """The plan's degrees and choices as a row; where layers differ, those of the first stage."""
        return self._row({**self.plan.mesh, **self.plan.knobs}, self.knobs)

    def contexts(self) -> list[Context]:
        """The rows that launchers judge: of every strategy, with the degrees, micro-batch size and choices of its place."""
        if self.plan.layerwise is None:
            return [self.context()]
        strategies, places = self.plan.layerwise["strategies"], self.plan.places
        at = self.plan.layerwise["at"] if places else [None] * len(strategies)
        found = []
        for strategy, number in zip(strategies, at, strict=True):
            degrees, knobs = {**self.plan.mesh, **self.plan.knobs}, dict(self.knobs)
            if number is not None:
                place = places[number]
                degrees |= {**place["mesh"], "micro_batch_size": place["micro_batch_size"]}
                own = {slot: str(value).lower() for slot, value in place["choices"].items()}
                knobs = _effective({**knobs, **own}, degrees)
            found.append(self._row(degrees, knobs | {slot: str(value) for slot, value in strategy.items()}))
        return found

    def _row(self, degrees: Mapping[str, Any], knobs: Mapping[str, str]) -> Context:
        tp, cp, pp, dp, ep, etp = (np.array([float(degrees[name])]) for name in _DEGREES)
        mesh, batch = Mesh(tp, cp, dp, pp, ep, etp), np.array([float(degrees["micro_batch_size"])])
        return Context(
            self.model, self.cluster, self.workload, load_stack(self.plan.stack), mesh, batch, knobs
        )

    def refused(self, launcher: Launcher) -> list[Problem]:
        """Every feature of the plan that the launcher cannot express, and every rule of the launcher that it breaks."""
        where = f"--to {launcher.name}"
        contexts = self.contexts()
        problems = [
            Problem(where, f"cannot express {slot}={value}")
            for slot in SLOTS
            for value in dict.fromkeys(ctx.knobs[slot] for ctx in contexts if slot in ctx.knobs)
            if not launcher.allows(slot, value)
        ]
        if not launcher.takes_stages(self.plan.stages, self.plan.mesh["pp"]):
            problems.append(Problem(where, f"cannot express pipeline_layout={self.knobs['pipeline_layout']}"))
        problems += [*self.differing(where, launcher), *self.placed(where, launcher)]
        reasons = broken(launcher.valid, contexts)
        families = sorted((broken(rules, contexts) for rules in launcher.families), key=len)
        reasons += families[0] if families else []
        return problems + [Problem(where, reason) for reason in dict.fromkeys(reasons)]

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
                yield from _unlike_ends(where, slot, of_ends(self.plan, slot))
            if not (allowed or blocks):
                yield Problem(
                    where, f"cannot express {slot} that differs between layers ({', '.join(values)})"
                )

    def placed(self, where: str, launcher: Launcher | None = None) -> Iterator[Problem]:
        """Layers on node groups, or cut in different ways: one mesh for all of them, unless a launcher lets layers differ, stages
        of equal size, and ranks in the order of the nodes are what launchers start."""
        places = self.plan.places
        own = frozenset() if launcher is None else launcher.per_place
        ways = [*ways_of_layers(self.plan), *ways_of_ends(self.plan)] if places else []
        differ = [name for name in (ways[0] if ways else ()) if len({str(way[name]) for way in ways}) > 1]
        for name in differ:
            values = ", ".join(dict.fromkeys(str(way[name]) for way in ways))
            what = "layers" if len({place["group"] for place in places}) == 1 else "stages"
            if name not in own:
                yield Problem(where, f"cannot express {name} that differs between {what} ({values})")
            elif launcher is not None and name in launcher.alike_at_ends:
                ends = ways_of_ends(self.plan)
                yield from _unlike_ends(where, name, (str(ends[0][name]), str(ends[1][name])))
        ranks = dict.fromkeys(way["tp"] * way["cp"] * way["dp"] for way in ways)
        if own and len(ranks) > 1:
            yield Problem(where, f"stages of {' and '.join(map(str, ranks))} devices", "equal stages")
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


def broken(rules: Callable[[Context], Iterable[Check]], contexts: Iterable[Context]) -> list[str]:
    """Reasons of the rules that any of some rows breaks, each once."""
    reasons = (check.reason for ctx in contexts for check in rules(ctx) if not np.all(check.ok))
    return list(dict.fromkeys(reasons))


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


def _effective(knobs: Mapping[str, str], mesh: Mapping[str, int]) -> dict[str, str]:
    """The choices without those that act on a degree of 1: they do nothing, and need no word of the launcher's."""
    idle: dict[str, str] = {}
    if mesh["tp"] == 1:
        idle = {slot: off(slot) for slot in ("sequence_parallel", "tensor_overlap")}
    if mesh["ep"] == 1:
        idle["expert_overlap"] = off("expert_overlap")
    if mesh["cp"] == 1:
        idle["context"] = "p2p"
    return {**knobs, **idle}


def _unlike_ends(where: str, name: str, ends: tuple[str, str]) -> Iterator[Problem]:
    """What is to be said where embedding and head differ."""
    if ends[0] != ends[1]:
        found = f"cannot express {name} that differs between embedding and head ({', '.join(ends)})"
        yield Problem(where, found)


def summary(plan: Plan) -> list[str]:
    """The plan in two lines: what runs where, and what it is predicted to cost."""
    degrees = " · ".join(f"{name} {plan.mesh[name]}" for name in _DEGREES)
    unlike = len({str(place["mesh"]) for place in plan.places}) > 1
    degrees += " for the embedding; layers differ" if unlike else ""
    estimate = plan.estimate
    tokens = f"{estimate.tokens_per_s_per_device:,.0f}"
    return [
        f"Plan {plan.id}: {plan.model} on {plan.cluster}, {counted(plan.devices, 'device')} ({degrees}).",
        f"Predicted: {estimate.step_time_s:.4g} s per step, {tokens} tokens/s per device, "
        f"{format_bytes(estimate.memory_bytes['peak'])} per device.",
    ]
