"""A serving plan: which pools to launch, what they are predicted to deliver, and how sure the search is.

The JSON form shares the schema's version with training plans; within a major version fields are only added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2s
from typing import Any

from planner.plans.form import SCHEMA_VERSION, known_fields, read_form
from planner.plans.plan import Optimality, SearchReport

__all__ = ["PARTS", "Pool", "ServeEstimate", "ServePlan", "ServeResult"]

PARTS = ("attention", "experts")
"""Roles of pools that generate together: parts of the same replicas."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one kind.

    Attributes:
        role: ``aggregated``, ``prefill`` or ``decode``; or ``attention`` and ``experts``, which generate together.
        replicas: how many.
        mesh: ``tp pp dp ep etp`` of one replica, and ``cp`` where ranks share prompts; its devices are tp · pp · dp · cp.
        knobs: every other choice: formats, ``chunk_tokens``, ``max_sequences`` …
        in_flight: requests in one replica at the predicted load, waiting ones included.
        cluster: which of a plan's clusters it runs on; empty where there is one.
        share: of its role's requests, all replicas together; zero where no other pool has the role.
    """

    role: str
    replicas: int
    mesh: Mapping[str, int]
    knobs: Mapping[str, Any]
    in_flight: int
    cluster: str = ""
    share: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The pool as JSON fields; its cluster and its share only where a plan has several."""
        fields = asdict(self)
        for name in ("cluster", "share"):
            if not fields[name]:
                del fields[name]
        return fields

    @property
    def devices(self) -> int:
        """Devices of all replicas."""
        return self.replicas * math.prod(self.mesh.get(name, 1) for name in ("tp", "pp", "dp", "cp"))


@dataclass(frozen=True, slots=True)
class ServeEstimate:
    """What a plan is predicted to deliver.

    Attributes:
        output_tokens_per_s_per_device: of the devices that the plan uses.
        output_tokens_per_s_per_user: 1 over the mean time between tokens; over that to the first where there is no other.
        ttft_s, tpot_s, e2e_s: mean and quantiles over requests: time to the first token, time between tokens, whole answer.
        max_concurrency: requests that all replicas' caches hold at once.
        goodput_requests_per_s: requests answered within the limits.
        usd_per_million_output_tokens: None without a price.
        joules_per_output_token: all devices at their power limit.
        memory_bytes: ``peak`` and its parts on the fullest device.
        memory_budget_bytes: what the peak is held against.
        binding: what keeps the load from growing: ``ttft``, ``tpot``, ``e2e``, ``memory``, ``sequences``, ``prompts`` (what the
            pool for them carries), ``rate`` or ``concurrency``; of offloaded plans the busiest stream.
        interval: by quantity, what holds 80 % of the measurements of published runs (means of ``ttft_s`` and ``tpot_s``).
    """

    output_tokens_per_s_per_device: float
    output_tokens_per_s_per_user: float
    ttft_s: Mapping[str, float]
    tpot_s: Mapping[str, float]
    e2e_s: Mapping[str, float]
    max_concurrency: int
    goodput_requests_per_s: float
    usd_per_million_output_tokens: float | None
    joules_per_output_token: float
    memory_bytes: Mapping[str, float]
    memory_budget_bytes: float
    binding: str
    interval: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class ServePlan:
    """One deployment.

    Attributes:
        model, cluster, stack: names (or paths) as given; ``traffic`` the requests and promises.
        mode: ``aggregated``, ``disaggregated``, ``ping_pong``, ``static`` or ``offloaded``.
        pools: what to launch.
        estimate: what it is predicted to deliver.
        optimality: what the search proved.
        assumptions: what the numbers rest on.
    """

    model: str
    cluster: str
    stack: str
    traffic: Mapping[str, Any]
    mode: str
    pools: tuple[Pool, ...]
    estimate: ServeEstimate
    optimality: Optimality
    assumptions: tuple[str, ...] = ()
    kind: str = "serving"
    schema_version: str = SCHEMA_VERSION

    @property
    def id(self) -> str:
        """Stable name of the choice (not of its estimate)."""
        pools = [{**replace(pool, share=0.0).as_dict(), "in_flight": None} for pool in self.pools]
        choice = [self.model, self.cluster, self.stack, dict(self.traffic), self.mode, pools]
        return blake2s(json.dumps(choice, sort_keys=True).encode(), digest_size=5).hexdigest()

    @property
    def devices(self) -> int:
        """Devices that the plan uses."""
        return sum(pool.devices for pool in self.pools)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON fields."""
        fields = asdict(self)
        fields["pools"], fields["assumptions"] = (
            [pool.as_dict() for pool in self.pools],
            list(self.assumptions),
        )
        return {"id": self.id, "devices": self.devices, **fields}

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "plan") -> ServePlan:
        """A plan from its JSON fields; fields of later minor versions are ignored.

        Raises:
            SpecError: fields are missing or wrong, or the major version is another.
        """

        def build() -> ServePlan:
            more = {
                "pools": tuple(Pool(**known_fields(pool, Pool)) for pool in data["pools"]),
                "estimate": ServeEstimate(**known_fields(data["estimate"], ServeEstimate)),
                "optimality": Optimality(**known_fields(data["optimality"], Optimality)),
                "assumptions": tuple(data.get("assumptions", ())),
            }
            return ServePlan(**{**known_fields(data, ServePlan), **more})

        return read_form(data, where, "planner.serving", build)


@dataclass(frozen=True, slots=True)
class ServeResult:
    """Ranked plans, the Pareto front of speed per user and per device, and the search's account of itself.

    ``days`` holds what a day's load takes of every plan, where one was asked for.
    """

    plans: tuple[ServePlan, ...]
    search: SearchReport
    pareto: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    days: tuple[Mapping[str, Any], ...] = ()

    @property
    def best(self) -> ServePlan:
        """The first plan."""
        return self.plans[0]

    def as_dict(self) -> dict[str, Any]:
        """The result as the JSON object that ``planner serve --json`` prints."""
        return {
            "schema_version": SCHEMA_VERSION,
            "plans": [plan.as_dict() for plan in self.plans],
            "pareto": [dict(point) for point in self.pareto],
            "search": asdict(self.search),
            "notes": list(self.notes),
            **({"days": [dict(day) for day in self.days]} if self.days else {}),
        }
