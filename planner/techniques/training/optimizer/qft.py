"""QFT: weights, gradients and the one moment of Lion are all stored in 8 bits.

What it does: holds every state as int8 with scales per tensor; weights are widened to 16 bits where a product reads them, and
    the update changes them in place, without a wide copy.
Saves: 13 of 16 bytes of model states per parameter.
Costs: widening of every matrix, forward and backward (1 byte read, 2 written per parameter).
Assumes: the few features that stay wide (about 1 %) are neglected; one replica, as described: no reduction of int8 gradients.
Source: Li et al. 2023 (arXiv:2310.07147) §3.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.costs.precision import cast_bytes, dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Check, Context, Figure, Technique
from planner.techniques.training.optimizer.update import state_bytes, trained, update

_KEY = "qft"


def valid(ctx: Context) -> Iterable[Check]:
    """One copy of the weights."""
    yield Check("int8 states (QFT) are described for one replica", ctx.mesh.dp * ctx.mesh.cp == 1)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Narrows weights and gradients, adds the moment, widens weights on use."""
    wide = float(cast_bytes(1.0, 1.0, dtype_bytes(ctx.format.activation)))
    casts = [
        Stream(
            what=f"{weights.what}.widen", block=weights.block, phase=phase, tags=frozenset({"weights"}), by=_KEY,
            size=weights.size, bytes_per_element=wide,
        )
        for weights in trained(ledger)
        if weights.block != "embedding"  # its rows are looked up, not multiplied
        for phase in ("forward", "backward")
    ]  # fmt: skip

    def narrow(item: Resident) -> Item | None:
        held = item.pool in ("parameters", "gradients") and item.lifetime == "always"
        return item.but(bytes_per_element=1.0, by=_KEY) if held and "frozen" not in item.tags else None

    return update(ledger, ctx, _KEY).edit(Resident, narrow).add(casts)


TECHNIQUE = Technique(
    key=_KEY,
    name="QFT (int8 weights, gradients and momentum)",
    slot="optimizer",
    choices=("lion_int8",),
    source="arXiv:2310.07147",
    summary="All model states in 8 bits, without a wide copy of the weights",
    figures=(
        Figure(
            "bytes of weights, gradients and Lion's momentum per parameter, all in INT8",
            3.0,
            1e-6,
            "Li et al. 2023 (arXiv:2310.07147), abstract: weights, gradients and optimizer states in INT8; Lion keeps one",
            lambda subject: state_bytes(subject, "lion_int8"),
        ),
    ),
    valid=valid,
    apply=apply,
)
