"""What the adaptation techniques share: frozen weights, narrow where they may be, and what is trained beside them."""

from __future__ import annotations

from collections.abc import Iterator

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context

__all__ = ["ENDS", "freeze", "narrow", "trained_weights"]

ENDS = ("embedding", "head")


def freeze(ledger: Ledger, inputs: tuple[str, ...]) -> Ledger:
    """The ledger without what trains its weights.

    ``inputs``: ends of the names of saved inputs that what is trained reads; they are kept in 16 bits, the others not at all.
    """

    def trains(item: Item) -> bool:
        if isinstance(item, Resident):
            unread = "linear_input" in item.tags and not item.what.endswith((*inputs, "core_output"))
            return item.pool == "gradients" or unread
        return item.phase == "weight" or (item.block == "embedding" and item.phase == "backward")

    return ledger.drop(trains).edit(Resident, _frozen)


def _frozen(item: Resident) -> Item | None:
    if item.pool == "parameters":
        return item.but(tags=item.tags | {"frozen"})
    if "linear_input" in item.tags:
        return item.but(tags=item.tags - {"linear_input"})
    return None


def trained_weights(what: str, block: str, size: str, by: str, mesh: str = "dense") -> Iterator[Resident]:
    """Weights that are trained, and their gradients."""
    for pool in ("parameters", "gradients"):
        yield Resident(
            what=f"{what}_{pool}", block=block, tags=frozenset({pool, mesh}), by=by, size=size, bytes_per_element=4.0, pool=pool,
            lifetime="always",
        )  # fmt: skip


def narrow(ledger: Ledger, ctx: Context, dtype_width: float, by: str) -> Ledger:
    """Holds the layers' frozen weights in so many bytes each, and widens them wherever a product reads them.

    Embedding and head stay as they are.
    """
    wide = dtype_bytes(ctx.format.activation)

    def layers(item: Item) -> bool:
        return isinstance(item, Resident) and "frozen" in item.tags and item.block not in ENDS

    casts = [
        Stream(
            what=f"{item.what}.widen", block=item.block, phase=phase, tags=frozenset({"weights"}), by=by, size=item.size,
            bytes_per_element=dtype_width + wide,
        )
        for item in ledger.of(Resident, pool="parameters")
        if layers(item)
        for phase in ("forward", "backward")
    ]  # fmt: skip

    def held(item: Resident) -> Item | None:
        tags = item.tags | {"narrow"}
        return item.but(bytes_per_element=dtype_width, tags=tags, by=by) if layers(item) else None

    return ledger.edit(Resident, held).add(casts)
