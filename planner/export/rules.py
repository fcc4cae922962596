"""How a launcher's abilities are written down: the choices that it can express, and its own rules over rows.

Every launcher's module holds both, with the version they were read from; :mod:`planner.export.launchers` gathers them. A launcher
bounds the search, and its exporter holds every plan against the same rules, so what such a search returns can be exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import TypeVar

import numpy as np

from planner.costs.collectives import group_members
from planner.ledger import Array
from planner.specs.model import Model
from planner.technique import Check, Context, Launcher, off

__all__ = [
    "COMMON",
    "distributed_optimizer_instances",
    "has_experts",
    "make_launcher",
    "per_model",
]

T = TypeVar("T")
_MOST_MODELS = 64

COMMON: Mapping[str, str] = {
    "tensor": "1d", "expert": "folded", "pipeline": "stages", "attention_kernel": "flash eager",
    "sequence_parallel": "true false",
}  # fmt: skip
"""Choices that every launcher has words for, or needs none."""


def make_launcher(
    name: str,
    choices: Mapping[str, str],
    valid: Callable[[Context], Iterable[Check]],
    stages: Callable[[Sequence[int], int], bool] | None = None,
    native: Mapping[str, str] | None = None,
    per_layer: Mapping[str, Sequence[str]] | None = None,
    alike_at_ends: str = "",
    per_place: str = "",
    families: Sequence[Callable[[Context], Iterable[Check]]] = (),
) -> Launcher:
    """A launcher from its tables.

    Args:
        name: as ``--for`` takes it.
        choices: slot → values between spaces; a slot that is left out must be off.
        valid: its rules over rows.
        stages: whether it can cut layers into virtual stages of these sizes, of a pipeline of so many devices; None: into any.
        native: slot → values that it works with by itself, so that a search for it tries them unasked.
        per_layer: slot → texts of values that layers of one plan may have side by side.
        alike_at_ends: slots among them, and degrees, in which embedding and head are alike.
        per_place: degrees, and slots that cut the work, that layers may have of their own.
        families: rules of which all layers of a plan keep one set together.
    """

    def allows(slot: str, value: str) -> bool:
        return value in choices.get(slot, off(slot)).split()

    own = {slot: frozenset(values.split()) for slot, values in (native or {}).items()}
    mixed = {
        slot: tuple(frozenset(text.split()) for text in texts) for slot, texts in (per_layer or {}).items()
    }
    ends, places = frozenset(alike_at_ends.split()), frozenset(per_place.split())
    return Launcher(name, allows, valid, stages, own, mixed, ends, places, tuple(families))


def per_model(find: Callable[[Model], T]) -> Callable[[Model], T]:
    """Remembers what was found for the models at hand: rules ask once per recipe, and models cannot be hashed."""
    known: dict[int, tuple[Model, T]] = {}

    def remembered(model: Model) -> T:
        if id(model) not in known:
            if len(known) >= _MOST_MODELS:
                known.clear()
            known[id(model)] = model, find(model)  # the model is kept, so that its id stays its own
        return known[id(model)][1]

    return wraps(find)(remembered)


def has_experts(model: Model) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(block.moe for block in model.blocks.values())


def distributed_optimizer_instances(ctx: Context) -> tuple[Array, Array]:
    """Copies of the sharded states when they are sharded over neighbouring ranks only: of dense weights, of experts."""
    domain, devices = ctx.cluster.tiers[0].size, float(ctx.cluster.devices)
    groups = (ctx.mesh.group("dp_cp"), ctx.mesh.group("edp"))
    dense, expert = (
        g.size / np.asarray(group_members(g.size, g.stride, domain, devices), dtype=float) for g in groups
    )
    return dense, expert
