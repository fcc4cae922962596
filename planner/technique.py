"""What a technique is: a slot, knobs, checks, one pass over the ledger, and the published figures that it reproduces.

A technique lives in one file under ``planner/techniques/<job>/``, ends in a module-level ``TECHNIQUE`` (or
``TECHNIQUES``), and is found by :func:`discover`. Slots give mutual exclusion by construction: a recipe is one choice per
slot, and passes run in slot order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from planner.ledger import Array, Ledger
    from planner.mesh import Mesh
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model
    from planner.specs.workload import TrainWorkload

__all__ = ["SLOTS", "Check", "Context", "Figure", "Knob", "Technique", "discover"]

SLOTS = (
    "format",  # dtypes of weights, activations, gradients, optimizer states
    "kernels",  # which kernels run the operators
    "tensor",
    "sequence",
    "context",
    "expert",
    "tensor_overlap",
    "data",  # gradient synchronisation and what is sharded over the data-parallel ranks
    "recompute",
    "optimizer_residency",
    "activation_residency",
    "parameter_residency",
    "schedule",
)
"""Slots of a training recipe, in the order in which their passes run."""

ADDITIVE_SLOTS = SLOTS[SLOTS.index("data") :]
"""From here on, passes only add time to a row (the ledger before them bounds it from below)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One composition rule over rows: rows where ``ok`` is false are rejected for ``reason``."""

    reason: str
    ok: NDArray[np.bool_] | bool


@dataclass(frozen=True, slots=True)
class Knob:
    """A choice that a technique opens: its name, what it means, and the values that it may take."""

    name: str
    meaning: str
    values: tuple[Any, ...] = ()
    default: Any = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A published number, and how the technique's pass reproduces it.

    ``compute(apply)`` runs ``apply`` (the technique's pass, or the identity in the test that the figure can fail) and
    returns the number. ``tolerance`` is relative.
    """

    what: str
    published: float
    tolerance: float
    source: str
    compute: Callable[[Callable[[Ledger, Context], Ledger]], float]


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a pass may look at: the problem, the mesh and micro-batch size of every row, and the recipe's own knobs."""

    model: Model
    cluster: Cluster
    workload: TrainWorkload
    mesh: Mesh
    micro_batch_size: Array
    knobs: Mapping[str, Any]

    @property
    def micro_batches(self) -> Array:
        """Micro-batches per pipeline and step, per row."""
        return self.workload.global_batch_size / (self.mesh.dp * self.micro_batch_size)


def _no_checks(ctx: Context) -> Iterable[Check]:
    return ()


def _identity(ledger: Ledger, ctx: Context) -> Ledger:
    return ledger


@dataclass(frozen=True, slots=True)
class Technique:
    """One entry of the catalogue.

    Attributes:
        key: the catalogue's key.
        slot: one of :data:`SLOTS`; None for presets, solvers and objectives.
        kind: technique, preset (a published combination), solver or objective.
        status: ``modelled``, or ``declared`` with the reason in ``summary`` (never counted as covered).
        choice: what the slot's knob shows for it, e.g. ``1f1b``.
        valid: composition rules; each becomes a rejection with its reason.
        apply: the pass.
        active: rows on which the pass does anything; elsewhere it repeats another candidate and is not counted.
    """

    key: str
    name: str
    slot: str | None
    source: str
    summary: str
    choice: str = ""
    job: Literal["training", "serving"] = "training"
    kind: Literal["technique", "preset", "solver", "objective"] = "technique"
    status: Literal["modelled", "declared"] = "modelled"
    knobs: tuple[Knob, ...] = ()
    figures: tuple[Figure, ...] = ()
    valid: Callable[[Context], Iterable[Check]] = _no_checks
    apply: Callable[[Ledger, Context], Ledger] = _identity
    active: Callable[[Context], NDArray[np.bool_] | bool] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The entry as ``planner techniques --json`` prints it."""
        return {
            "key": self.key,
            "name": self.name,
            "job": self.job,
            "kind": self.kind,
            "slot": self.slot,
            "status": self.status,
            "source": self.source,
            "summary": self.summary,
            "knobs": [knob.name for knob in self.knobs],
            "figures": [
                {"what": f.what, "published": f.published, "tolerance": f.tolerance, "source": f.source}
                for f in self.figures
            ],
        }


@cache
def discover() -> Mapping[str, Technique]:
    """Every technique by key: those of ``planner.techniques``, then those of the ``planner.techniques`` entry points."""
    import planner.techniques

    found: dict[str, Technique] = {}
    for info in walk_packages(planner.techniques.__path__, "planner.techniques."):
        module = import_module(info.name)
        entries = getattr(module, "TECHNIQUES", None) or (
            (module.TECHNIQUE,) if hasattr(module, "TECHNIQUE") else ()
        )
        for entry in entries:
            assert entry.key not in found, f"two techniques are called {entry.key}"
            found[entry.key] = entry
    for technique in _third_party():
        found.setdefault(technique.key, technique)
    return found


def _third_party() -> list[Technique]:
    import sys

    if "importlib.metadata" not in sys.modules and not _has_entry_points():
        return []
    from importlib.metadata import entry_points

    return [entry.load() for entry in entry_points(group="planner.techniques")]


def _has_entry_points() -> bool:
    return True
