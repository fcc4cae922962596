"""What published figures of serving techniques are computed with: an iteration's ledger around one pass, and sums over it.

Everything heavy is imported when a figure is computed, so that finding the techniques stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.ledger import AttentionCore, Collective, Ledger, Resident
from planner.technique import SERVING_SLOTS, ServingContext, discover

if TYPE_CHECKING:
    from planner.specs.model import Model

__all__ = [
    "Pass",
    "cache_bytes_per_token",
    "default",
    "parameter_bytes",
    "read_bytes",
    "read_bytes_per_token",
    "repeats",
    "run",
    "sent_elements",
    "sixteen",
]

Pass = Callable[[Ledger, ServingContext], Ledger]
_DEGREES = ("tp", "cp", "dp", "pp", "ep", "etp")
_ENDS = ("embedding", "head", "boundary")


def run(
    slot: str, subject: Pass, *, model: str | Model, decodes: float = 1.0, cached: float = 1024.0, prefill: float = 0.0,
    cluster: str = "h100-sxm:1x8", **choices: Any,
) -> Ledger:  # fmt: skip
    """The ledger of one iteration with ``subject`` as the pass of ``slot``; all other slots have their choice, or the default.

    ``cached`` tokens lie in a generating sequence's cache. ``choices`` are degrees (1 unless given), knobs, and the adapters that
    the traffic asks for.
    """
    from planner.mesh import Mesh
    from planner.serving.composition import Composition, composition_axes, iteration_ledger
    from planner.specs.hardware import load_cluster
    from planner.specs.models import load_model
    from planner.specs.stack import load_stack
    from planner.specs.traffic import Traffic

    spec = load_model(model) if isinstance(model, str) else model
    degrees: dict[str, Any] = {name: np.array([float(choices.pop(name, 1))]) for name in _DEGREES}
    asked = {
        name: choices.pop(name) for name in ("adapters", "adapter_rank") if isinstance(choices.get(name), int)
    }
    traffic = Traffic(1, 1, **asked)
    defaults = {t.slot: t for t in discover("serving").values() if t.default}
    knobs = {name: t.choices[0] for name, t in defaults.items() if name is not None} | choices
    ctx = ServingContext(spec, load_cluster(cluster), traffic, load_stack("vllm"), Mesh(**degrees), knobs)
    passes = {(t.slot, choice): t.apply for t in discover("serving").values() for choice in t.choices}
    ledger = iteration_ledger(spec)
    for name in SERVING_SLOTS:
        apply = subject if name == slot else passes.get((name, str(knobs[name])), defaults[name].apply)
        ledger = apply(ledger, ctx)
    batch = Composition(*(np.array([x]) for x in (decodes, decodes * cached, prefill, (prefill + 1.0) / 2.0)))
    return ledger.set_axes(**composition_axes(spec, ctx.mesh, batch, micro_batches=2))


def default(slot: str) -> Pass:
    """The default pass of a slot."""
    return next(t for t in discover("serving").values() if t.slot == slot and t.default).apply


def sixteen(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """The default pass of the slot ``weights``."""
    return default("weights")(ledger, ctx)


def repeats(ledger: Ledger, block: str) -> int:
    """How often a block occurs, where every kind is named after itself."""
    return int(ledger.axes[f"repeat@{block}"]) if f"repeat@{block}" in ledger.axes else 1


def parameter_bytes(ledger: Ledger, *, layers_only: bool = False) -> float:
    """Bytes of weights on a rank, every layer counted."""
    return sum(
        _value(ledger, item.size) * item.bytes_per_element * repeats(ledger, item.block)
        for item in ledger.of(Resident, pool="parameters")
        if not (layers_only and item.block in _ENDS)
    )


def cache_bytes_per_token(ledger: Ledger) -> float:
    """Bytes that one token leaves in all layers' caches."""
    found = (i for i in ledger.of(Resident, pool="kv_cache") if i.what != "ssm.state")
    return sum(
        _value(ledger, i.size) / _value(ledger, "kv_seq") * i.bytes_per_element * repeats(ledger, i.block)
        for i in found
    )


def read_bytes(ledger: Ledger) -> float:
    """Bytes of the cache that generation reads in all layers."""
    from planner.costs.precision import dtype_bytes

    total = 0.0
    for item in ledger.of(AttentionCore, decode=True):
        width = _value(ledger, item.qk_dim) + (0.0 if item.latent else _value(ledger, item.v_dim))
        keys = _value(ledger, item.batch) * _value(ledger, item.kv_heads) * _value(ledger, item.kv)
        total += keys * width * dtype_bytes(item.stored) * repeats(ledger, item.block)
    return total


def read_bytes_per_token(slot: str, subject: Pass, model: str) -> float:
    """Bytes of the cache that a generating sequence reads in all layers per token of context."""
    one, other = (
        read_bytes(run(slot, subject, model=model, decodes=1.0, cached=cached)) for cached in (1000.0, 2000.0)
    )
    return (other - one) / 1000.0


def sent_elements(ledger: Ledger, group: str, *, layers_only: bool = False) -> float:
    """Elements that one rank sends in the collectives of a group, of one block of each kind."""
    total = 0.0
    for item in ledger.of(Collective):
        if item.group.name == group and not (layers_only and item.block in _ENDS):
            size = float(np.ravel(item.group.size)[0])
            factor = {"all_reduce": 2.0 * (size - 1) / size, "point_to_point": float(size > 1)}
            total += _value(ledger, item.size) * factor.get(item.kind, (size - 1) / size)
    return total


def _value(ledger: Ledger, size: str) -> float:
    return float(np.ravel(ledger.axes[size])[0])
