"""The candidates of a serving problem: recipes (categories, in loops) times rows of meshes and iteration budgets (arrays)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import Problem as Fault
from planner.errors import SpecError, did_you_mean
from planner.ledger import Array
from planner.mesh import Mesh
from planner.specs.serve_problem import ServeProblem
from planner.technique import SERVING_SLOTS, discover
from planner.units import counted

__all__ = [
    "CHUNKS",
    "DEGREES",
    "MODES",
    "ROLES",
    "SERVE_NUMBERS",
    "ServeSpace",
    "degrees_of",
    "links_of",
    "mesh_of",
    "recipe_of",
    "row_of",
    "size_of",
]

DEGREES = ("tp", "pp", "dp", "ep", "etp", "cp")
SERVE_NUMBERS = (*DEGREES, "chunk_tokens", "max_sequences", "replicas", "draft_tokens")
ROLES = ("aggregated", "prefill", "decode")
MODES = ("aggregated", "disaggregated", "ping_pong", "static", "offloaded")
CHUNKS = (1024, 2048, 4096, 8192, 16384)
"""Tokens of an iteration that engines are started with: ``max_num_batched_tokens``, ``chunked_prefill_size``."""


_HANDED_OVER = {"cache_copies": ("kept",)}
"""Choices of pools between which caches travel: engines hand over whole ones."""
_GENERATING = {"prompt_ranks": ("alone",)}
"""Choices of pools that generate: a step has one token of a sequence, which nothing is gained by sharing."""


class ServeSpace:
    """The candidates of one pool.

    Args:
        problem: the problem; what is fixed for ``prefill.tp`` holds in the pool of that role alone, and before ``tp``.
        role: ``aggregated``, ``prefill`` or ``decode``.

    Raises:
        SpecError: a fixed knob or value is unknown, or a forbidden glob matches nothing.
    """

    def __init__(self, problem: ServeProblem, role: str = "aggregated") -> None:
        self.problem, self.role = problem, role
        self._unmatched = {*problem.forbidden, *problem.explore} - {"all"}
        self.fixed = self._checked(problem.fixed)
        self.choices = {slot: self._slot(slot) for slot in SERVING_SLOTS}
        self.meshes = self._meshes()
        self.chunks = self._numbers("chunk_tokens", CHUNKS)
        if self._unmatched:
            known = [f"{slot}={value}" for slot, values in self.choices.items() for value in values]
            raise SpecError(
                [
                    Fault(
                        f"--{'forbid' if glob in problem.forbidden else 'explore'} {glob}",
                        "matches no knob or choice",
                        "",
                        did_you_mean(glob, [*known, *DEGREES]),
                    )
                    for glob in sorted(self._unmatched)
                ]
            )

    def recipes(self) -> Iterator[dict[str, str]]:
        """Every combination of choices; where tokens may be drafted, without drafts and with every number of them."""
        for values in product(*(self.choices[slot] for slot in SERVING_SLOTS)):
            recipe = dict(zip(SERVING_SLOTS, values, strict=True))
            for drafted in self._drafted():
                yield {**recipe, "draft_tokens": str(drafted)} if drafted else recipe

    def _drafted(self) -> list[int]:
        speculation = self.problem.speculation
        if speculation is None or self.role == "prefill":
            return [0]
        if "draft_tokens" in self.fixed:
            return [int(self.fixed["draft_tokens"])]
        return [0, *(n for n in speculation.tokens if not self._forbidden(f"draft_tokens={n}"))]

    def _slot(self, slot: str) -> list[str]:
        techniques = [t for t in discover("serving").values() if t.slot == slot]
        known = [choice for t in sorted(techniques, key=lambda t: not t.default) for choice in t.choices]
        searched = {
            choice
            for t in techniques
            for choice in t.choices
            if t.searched
            or slot in self.fixed
            or self._explored(f"{slot}={choice}")
            or self._native(slot, choice)
        }
        wanted: tuple[str, ...] = tuple(choice for choice in known if choice in searched)
        if slot == "weights":
            wanted = self.problem.precisions
        if slot == "cache":
            wanted = self.problem.caches
        if self.role != "aggregated":
            wanted = _HANDED_OVER.get(slot, wanted)
        if self.role != "prefill":
            wanted = _GENERATING.get(slot, wanted)
        elif slot == "prompt_ranks" and self.fixed.get("cp", 1) > 1:
            wanted = tuple(choice for choice in wanted if choice != "alone") or ("all_gather",)
        if slot in self.fixed:
            wanted = (str(self.fixed[slot]).lower(),)
        for value in wanted:
            if value not in known:
                where = (
                    f"--fix {slot}" if slot in self.fixed else "--precision" if slot == "weights" else slot
                )
                raise SpecError(
                    Fault(where, repr(value), f"one of {', '.join(known)}", did_you_mean(value, known))
                )
        hidden = {value for value in known if self._forbidden(f"{slot}={value}")}
        launcher = self.problem.launcher
        if launcher is not None and not any(launcher.allows(slot, value) for value in wanted):
            raise SpecError(
                Fault(
                    f"--engine {launcher.name}",
                    f"has no words for {slot}={', '.join(wanted)}",
                    "another engine",
                )
            )
        kept = [
            value
            for value in wanted
            if value not in hidden and (launcher is None or launcher.allows(slot, value))
        ]
        if not kept:
            raise SpecError(Fault("--forbid", f"nothing is left for {slot}", "at least one choice per slot"))
        return kept

    def _meshes(self) -> NDArray[Any]:
        """Every mesh of a replica that the model admits, one row of :data:`DEGREES` each."""
        model, cluster = self.problem.model, self.problem.cluster
        devices = cluster.devices
        blocks = list(model.blocks.values())
        heads = [b.attention.heads for b in blocks if b.attention]
        experts = [b.moe.experts for b in blocks if b.moe]
        latent = any(b.attention.latent for b in blocks if b.attention)
        powers = [2**i for i in range(devices.bit_length()) if 2**i <= devices]
        tps = self._numbers("tp", [t for t in powers if all(h % t == 0 for h in heads)])
        pps = self._numbers("pp", [p for p in powers if p <= model.n_layers])
        # Without experts or a latent cache, attention ranks that share nothing are replicas.
        dps = self._numbers("dp", powers if experts or latent else [1])
        cps = self._numbers("cp", [1] if self.choices["prompt_ranks"] == ["alone"] else powers)
        if self.role != "prefill" and cps != [1]:
            raise SpecError(Fault("--fix cp", f"{cps[0]} in a pool that generates", "--fix prefill.cp"))
        rows = []
        for tp, pp, dp, cp in product(tps, pps, dps, cps):
            if tp * pp * dp * cp > devices:
                continue
            ranks = tp * dp * cp
            eps = self._numbers(
                "ep",
                [e for e in powers if ranks % e == 0 and all(x % e == 0 for x in experts)]
                if experts
                else [1],
            )
            etps = self._numbers(
                "etp", sorted({ranks // e for e in eps if ranks % e == 0}) if experts else [ranks]
            )
            found = [
                (tp, pp, dp, ep, etp, cp) for ep in eps for etp in etps if not experts or ep * etp == ranks
            ]
            rows += found
        if not rows:
            wanted = ", ".join(f"{name}={self.fixed[name]}" for name in DEGREES if name in self.fixed)
            raise SpecError(
                Fault(
                    "--fix",
                    f"no replica on {counted(devices, 'device')} has {wanted or 'these degrees'}",
                    "other degrees",
                )
            )
        return np.array(rows, dtype=np.float64)

    def _native(self, slot: str, choice: str) -> bool:
        """Whether the engine that the plan is for works with a choice by itself, so that it is tried unasked."""
        launcher = self.problem.launcher
        return launcher is not None and launcher.native(slot, choice, self.problem.model)

    def _numbers(self, name: str, values: Any) -> list[int]:
        kept = [value for value in values if not self._forbidden(f"{name}={value}")]
        return [self.fixed[name]] if name in self.fixed else kept

    def _forbidden(self, text: str) -> bool:
        hits = [glob for glob in self.problem.forbidden if fnmatchcase(text, glob)]
        self._unmatched.difference_update(hits)
        return bool(hits)

    def _explored(self, text: str) -> bool:
        hits = [glob for glob in self.problem.explore if glob == "all" or fnmatchcase(text, glob)]
        self._unmatched.difference_update(hits)
        return bool(hits)

    def _checked(self, fixed: Mapping[str, Any]) -> dict[str, Any]:
        known = (*SERVE_NUMBERS, *SERVING_SLOTS, "mode")
        faults: list[Fault] = []
        checked: dict[str, Any] = {}
        # What is said of one pool comes last, and wins.
        for full, value in sorted(fixed.items(), key=lambda item: "." in item[0]):
            role, dot, name = full.rpartition(".")
            if dot and role in ROLES and role != self.role:
                continue
            if (dot and role not in ROLES) or name not in known:
                name = full
                hint = did_you_mean(name, known)
                faults.append(Fault(f"--fix {name}", "unknown knob", f"one of {', '.join(known)}", hint))
            elif name in SERVE_NUMBERS:
                try:
                    number = int(str(value))
                except ValueError:
                    number = -1
                if not int(name != "draft_tokens") <= number <= 10**7:
                    faults.append(Fault(f"--fix {name}", repr(value), "a whole number from 1"))
                if name == "replicas" and number > self.problem.cluster.devices and not self.problem.others:
                    found = f"{number} on {counted(self.problem.cluster.devices, 'device')}"
                    faults.append(Fault(f"--fix {full}", found, "one device each, at least"))
                checked[name] = number
            else:
                checked[name] = str(value).lower()
        if checked.get("mode", "aggregated") not in MODES:
            faults.append(Fault("--fix mode", repr(fixed["mode"]), f"one of {', '.join(MODES)}"))
        if faults:
            raise SpecError(faults)
        return checked


def recipe_of(knobs: Mapping[str, Any]) -> dict[str, str]:
    """The recipe among a pool's knobs; of slots that an older plan does not know, the default."""
    usual = {t.slot: t.choices[0] for t in discover("serving").values() if t.default}
    recipe = {name: str(knobs.get(name, usual[name])) for name in SERVING_SLOTS}
    return recipe | {name: str(knobs[name]) for name in ("draft_tokens",) if name in knobs}


def mesh_of(rows: NDArray[Any]) -> Mesh:
    """Rows of :data:`DEGREES` as a mesh."""
    tp, pp, dp, ep, etp, cp = (np.ascontiguousarray(rows[..., index]) for index in range(len(DEGREES)))
    return Mesh(tp, cp, dp, pp, ep, etp)


def row_of(mesh: Mapping[str, int]) -> NDArray[Any]:
    """A pool's mesh as one row of :data:`DEGREES`; what it does not name is 1."""
    return np.array([[float(mesh.get(name, 1)) for name in DEGREES]])


def degrees_of(row: NDArray[Any]) -> dict[str, int]:
    """A row of :data:`DEGREES` as a pool's mesh, which names ``cp`` where prompts are shared."""
    found = {name: int(value) for name, value in zip(DEGREES, row, strict=True)}
    return found if found["cp"] > 1 else {name: value for name, value in found.items() if name != "cp"}


def links_of(rows: NDArray[Any], recipe: Mapping[str, str]) -> Array:
    """Devices over which a request's cache is spread, per row: ranks that share a prompt by gathering all keep all of it."""
    parts = rows[..., 5] if recipe.get("prompt_ranks") == "pass_kv" else 1.0
    return np.asarray(rows[..., 0] * rows[..., 1] * parts)


def size_of(rows: NDArray[Any]) -> Array:
    """Devices of a replica, per row of :data:`DEGREES`."""
    return np.asarray(rows[..., 0] * rows[..., 1] * rows[..., 2] * rows[..., 5])
