"""A model's ledger after the first slots of a recipe, on meshes of the caller's own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from planner.errors import Problem, SpecError, did_you_mean
from planner.ledger import Array, Ledger
from planner.mesh import Mesh
from planner.operators.baseline import baseline
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, Context, Technique, discover, off

__all__ = ["run_passes"]


def run_passes(
    model: Model, cluster: Cluster, stack: Stack, workload: TrainWorkload, mesh: Mesh, batch: Array, before: str,
    knobs: Mapping[str, str],
) -> tuple[Ledger, Context, NDArray[np.bool_], str]:  # fmt: skip
    """The ledger of all slots before one, their defaults unless ``knobs`` choose; which rows the rules allow, and why not.

    Args:
        model: whose ledger.
        cluster: of the devices.
        stack: the software.
        workload: sequence length and document length; its batch is not used.
        mesh: degrees, a row each.
        batch: sequences in the micro-batch, a row each.
        before: the first slot whose pass is not run.
        knobs: choices by slot.

    Raises:
        SpecError: a knob names no slot before, or no choice of its slot.
    """
    slots = SLOTS[: SLOTS.index(before)]
    strange = [name for name in knobs if name not in slots]
    if strange:
        raise SpecError(
            Problem(
                f"--fix {strange[0]}",
                "does not apply here",
                f"one of {', '.join(slots)}",
                did_you_mean(strange[0], slots),
            )
        )
    chosen = {slot: knobs.get(slot, _default(slot)) for slot in slots}
    ctx = Context(model, cluster, workload, stack, mesh, batch, chosen)
    ledger = baseline(model, batch=batch, seq=float(workload.seq_len), document_len=workload.document_len)
    allowed, reason = np.ones(len(batch), dtype=bool), ""
    for slot in slots:
        for technique in _serving(slot, chosen[slot]):
            for check in technique.valid(ctx):
                reason = reason or (check.reason if not np.all(check.ok) else "")
                allowed = allowed & check.ok
            ledger = technique.apply(ledger, ctx)
    return ledger, ctx, allowed, reason


def _serving(slot: str, value: str) -> list[Technique]:
    found = [t for t in discover("training").values() if t.slot == slot and value in t.choices]
    if not found and value != off(slot):
        known = [off(slot), *(c for t in discover("training").values() if t.slot == slot for c in t.choices)]
        raise SpecError(
            Problem(f"--fix {slot}", repr(value), f"one of {', '.join(known)}", did_you_mean(value, known))
        )
    return found


def _default(slot: str) -> str:
    chosen = [t.choices[0] for t in discover("training").values() if t.slot == slot and t.default]
    return chosen[0] if chosen else off(slot)
