"""A plan: what to launch, what it is predicted to cost, and how sure the search is.

The JSON form is versioned; within a major version fields are only added, so that plans written today load tomorrow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2s
from pathlib import Path
from typing import Any

from planner.errors import Problem as Fault
from planner.errors import SpecError
from planner.plans.form import SCHEMA_VERSION, known_fields, read_form
from planner.specs.reader import read_file

__all__ = [
    "SCHEMA_VERSION",
    "Estimate",
    "Optimality",
    "Plan",
    "SearchReport",
    "SearchResult",
]


@dataclass(frozen=True, slots=True)
class Optimality:
    """How good the plan is known to be: ``exact`` (under this model), within a ``gap`` of ``bound_s``, or ``heuristic``.

    ``gap`` and ``bound_s`` are None where nothing was searched.
    """

    status: str
    gap: float | None
    bound_s: float | None
    solver: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan is predicted to cost.

    Attributes:
        step_time_s: one optimizer step.
        tokens_per_s_per_device: throughput.
        mfu: model FLOP (full, non-causal attention inside documents) over the dense peak of the precision; a fraction.
        hfu: the same with the FLOP that are executed (recompute included, masked attention left out).
        memory_bytes: ``peak`` and its pools on the device that holds most.
        breakdown_s: seconds of the step on the busiest device by what they are spent on; they add up to ``step_time_s``.
        fits: whether device memory and the tiers below it suffice.
        memory_budget_bytes: what the peak is held against.
        host_bytes, cxl_bytes, nvme_bytes: host memory, CXL memory and NVMe per device.
        cached_bytes: what the allocator keeps beyond the peak as long as there is room: a process shows it and does not need it.
        usd_per_step, joules_per_step: over all devices; None without a price.
        interval: what holds 80 % of measurements of such plans, ``step_time_s`` and ``peak``: lowest and highest; None in plans
            that were written without one.
        oom_probability: how likely the measured peak is above the device's memory; None as above.
        provenance: the weakest kind of constant behind ``step_time_s`` and ``peak``, and the names of those that are
            ``assumed``; None as above.
    """

    step_time_s: float
    tokens_per_s_per_device: float
    mfu: float
    hfu: float
    memory_bytes: Mapping[str, float]
    breakdown_s: Mapping[str, float]
    fits: bool
    memory_budget_bytes: float
    host_bytes: float
    joules_per_step: float
    usd_per_step: float | None = None
    cached_bytes: float = 0.0
    nvme_bytes: float = 0.0
    cxl_bytes: float = 0.0
    interval: Mapping[str, Sequence[float]] | None = None
    oom_probability: float | None = None
    provenance: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One execution plan.

    Attributes:
        model, cluster: names (or paths) as given; ``workload`` the job's fields.
        mesh: ``tp cp pp dp ep etp``.
        knobs: every other choice.
        stages: transformer layers per virtual stage; stage ``chunk·pp + device``.
        estimate: predicted cost.
        optimality: what the search proved.
        assumptions: what the numbers rest on.
        stack: name (or path) of the software stack.
        layerwise: where layers differ in their choices: ``strategies``, each its additive choices by slot; ``stages``, per
            virtual stage the runs ``[strategy, layers]`` in the order of its layers; ``embedding`` and ``head``, their
            strategies. ``knobs`` then has the choices of the first strategy. Where stages run on node groups that differ,
            ``places`` are the groups with the ``mesh``, the micro-batch size and the choices of their ``stages``, and ``at``
            says the place of every strategy; ``mesh`` and ``knobs`` then are those of the first stage. None where all
            layers are treated alike.
        permissions: what the plan does that changes the result of training (:data:`planner.specs.problem.PERMISSIONS`).
    """

    model: str
    cluster: str
    workload: Mapping[str, Any]
    mesh: Mapping[str, int]
    knobs: Mapping[str, Any]
    stages: tuple[int, ...]
    estimate: Estimate
    optimality: Optimality
    assumptions: tuple[str, ...] = ()
    stack: str = "default"
    permissions: tuple[str, ...] = ()
    schema_version: str = SCHEMA_VERSION
    layerwise: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        """Stable name of the choice (not of its estimate): the same problem and knobs give the same id."""
        choice = [self.model, self.cluster, dict(self.workload), dict(self.mesh), dict(self.knobs)]
        if self.layerwise is not None:
            choice.append(dict(self.layerwise))
        return blake2s(json.dumps(choice, sort_keys=True).encode(), digest_size=5).hexdigest()

    @property
    def devices(self) -> int:
        """World size."""
        ranks = [mesh["tp"] * mesh["cp"] * mesh["dp"] for mesh in self.stage_meshes]
        return sum(ranks) if self.places else ranks[0] * self.mesh["pp"]

    @property
    def places(self) -> Sequence[Mapping[str, Any]]:
        """Where stages run, if node groups differ: ``places`` of ``layerwise``."""
        found: Sequence[Mapping[str, Any]] = (
            () if self.layerwise is None else self.layerwise.get("places", ())
        )
        return found

    @property
    def stage_meshes(self) -> list[Mapping[str, int]]:
        """Degrees of every stage of the pipeline, where they differ; otherwise those of all."""
        if not self.places:
            return [self.mesh]
        of_stage = {stage: place["mesh"] for place in self.places for stage in place["stages"]}
        return [of_stage[stage] for stage in sorted(of_stage)]

    @property
    def micro_batches(self) -> int:
        """Micro-batches per pipeline and step."""
        return int(self.workload["global_batch_size"] // (self.mesh["dp"] * self.knobs["micro_batch_size"]))

    def check(self) -> None:
        """Holds the plan against itself.

        Raises:
            ValueError: layers are those of no strategy, or not as many as its stages have, or strategies are at no place.
        """
        if self.layerwise is None:
            return
        strategies, stages = self.layerwise["strategies"], self.layerwise["stages"]
        used = {s for runs in stages for s, _ in runs} | {
            self.layerwise[end] for end in ("embedding", "head")
        }
        if not used <= set(range(len(strategies))):
            raise ValueError(f"uses strategies {sorted(used)} of {len(strategies)}")
        if tuple(sum(layers for _, layers in runs) for runs in stages) != self.stages:
            raise ValueError("has other layers in layerwise.stages than in stages")
        if self.places:
            at = self.layerwise.get("at", ())
            if len(at) != len(strategies) or not set(at) <= set(range(len(self.places))):
                raise ValueError(
                    f"has {len(strategies)} strategies at places {list(at)} of {len(self.places)}"
                )

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON fields."""
        fields = asdict(self)
        for name in ("stages", "assumptions", "permissions"):
            fields[name] = list(fields[name])
        if self.layerwise is None:  # plans that treat all layers alike have no such field
            del fields["layerwise"]
        return {"id": self.id, **fields}

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "plan") -> Plan:
        """A plan from its JSON fields; fields of later minor versions are ignored.

        Raises:
            SpecError: fields are missing or wrong, or the major version is another.
        """

        if "pools" in data and "knobs" not in data:
            raise SpecError(Fault(where, "is a serving plan", "a training plan", "planner train makes them."))

        def build() -> Plan:
            estimate = Estimate(**known_fields(data["estimate"], Estimate))
            optimality = Optimality(**known_fields(data["optimality"], Optimality))
            fields = {**known_fields(data, Plan), "estimate": estimate, "optimality": optimality}
            fields["stages"] = tuple(data["stages"])
            fields |= {name: tuple(data.get(name, ())) for name in ("assumptions", "permissions")}
            plan = Plan(**fields)
            plan.check()
            return plan

        return read_form(data, where, "planner.plans", build)

    @staticmethod
    def from_json(path: str | Path, index: int | str = 1) -> Plan:
        """A plan from a file: a single plan, or the ``index``-th (from 1), or the one with that id, of a search result.

        Raises:
            SpecError: the file is unreadable, holds no plans, or has no such plan.
        """
        data = read_file(path)
        if "plans" not in data:
            return Plan.from_dict(data, str(path))
        plans = data["plans"]
        if not isinstance(plans, list) or not plans:
            raise SpecError(Fault(f"{path}: plans", "holds no plans", "a list of at least one plan"))
        by_id = {plan.get("id"): plan for plan in plans if isinstance(plan, dict)}
        if str(index) in by_id:
            return Plan.from_dict(by_id[str(index)], f"{path}:{index}")
        if not str(index).isdigit() or not 1 <= int(index) <= len(plans):
            raise SpecError(
                Fault(
                    f"{path}:{index}",
                    "no such plan",
                    f"1 to {len(plans)}, or one of {', '.join(map(str, by_id))}",
                )
            )
        chosen = plans[int(index) - 1]
        if not isinstance(chosen, dict):
            raise SpecError(Fault(f"{path}:{index}", f"holds a {type(chosen).__name__}", "a plan"))
        return Plan.from_dict(chosen, f"{path}:{index}")


@dataclass(frozen=True, slots=True)
class SearchReport:
    """How the space was exhausted: ``candidates = scored + all excluded + all rejected``."""

    candidates: int
    scored: int
    repriced: int
    excluded_by_bound: Mapping[str, int]
    rejected: Mapping[str, int]
    wall_s: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Ranked plans, the Pareto front of time and memory among what was scored, and the search's account of itself.

    ``layerwise`` is the account of the search of plans whose layers differ, where there was one, ``mixed`` that of plans whose
    stages run on node groups that differ.
    """

    plans: tuple[Plan, ...]
    search: SearchReport
    pareto: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=())
    layerwise: Mapping[str, Any] | None = None
    mixed: Mapping[str, Any] | None = None

    @property
    def best(self) -> Plan:
        """The first plan."""
        return self.plans[0]

    def as_dict(self) -> dict[str, Any]:
        """The result as the JSON object that ``planner train --json`` prints."""
        found: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "plans": [plan.as_dict() for plan in self.plans],
            "pareto": [dict(point) for point in self.pareto],
            "search": asdict(self.search),
            "notes": list(self.notes),
        }
        accounts = {"layerwise": self.layerwise, "mixed": self.mixed}
        return {**found, **{name: dict(account) for name, account in accounts.items() if account is not None}}
