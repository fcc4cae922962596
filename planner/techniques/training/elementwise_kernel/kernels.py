"""What operators cost that run as kernels of their own, in passes over their elements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Context

__all__ = ["GATED", "Kernels", "activated_gate", "is_gated", "is_rmsnorm", "run_apart", "saved"]


class Kernels(NamedTuple):
    """One phase of an operator: kernels, and passes over its elements: in fp32, in the activations' dtype, and casts."""

    launches: float
    fp32: float = 0.0
    plain: float = 0.0
    casts: float = 0.0

    def bytes_per_element(self, width: float) -> float:
        """Bytes moved per element of ``width`` bytes; what is fp32 already is not cast.

        >>> Kernels(4.0, plain=5.0, casts=2.0).bytes_per_element(2.0)  # 5 * 2 + 2 * (2 + 4)
        22.0
        """
        casts = self.casts if width < 4.0 else 0.0
        return 4.0 * self.fp32 + width * self.plain + (4.0 + width) * casts


GATED = {"forward": Kernels(2.0, plain=5.0), "backward": Kernels(3.0, plain=9.0)}
"""A gated activation by PyTorch's operators: activation (read, write), product (two reads, write). Backward: three kernels of
two reads and one write."""


def is_rmsnorm(item: Stream, ctx: Context) -> bool:
    """Whether an operator is an RMSNorm. An indexer normalises its keys by LayerNorm (DeepSeek-V3.2, arXiv:2512.02556)."""
    if "norm" not in item.what.rpartition(".")[2] or "indexer" in item.tags:
        return False
    spec = ctx.model.blocks.get(item.block.removeprefix("encoder."))
    return (ctx.model.final_norm if spec is None else spec.norm) == "rmsnorm"


def is_gated(item: Stream, ctx: Context) -> bool:
    """Whether an operator is the activation of a gated feed-forward network."""
    spec = ctx.model.blocks.get(item.block.removeprefix("encoder."))
    if spec is None or item.what.rpartition(".")[2] != "act":
        return False
    network = spec.mlp if item.what.startswith("mlp.") else spec.moe
    return network is not None and network.gated


def activated_gate(item: Stream, width: float, by: str) -> Resident:
    """What a gated activation of two operators keeps beyond its inputs."""
    return saved(item, "activated_gate", width, by)


def saved(item: Stream, name: str, n_bytes: float, by: str) -> Resident:
    """A tensor of the operator's size, kept for the backward, and made again where the operator is."""
    return Resident(
        what=f"{item.what}.{name}", block=item.block, tags=item.tags | {"saved"}, by=by, size=item.size,
        bytes_per_element=n_bytes, pool="activations", lifetime="micro_batch",
    )  # fmt: skip


def run_apart(
    ledger: Ledger,
    width: float,
    by: str,
    kernels: Callable[[Stream], Mapping[str, Kernels]],
    kept: Iterable[Resident],
) -> Ledger:
    """Prices operators kernel by kernel, and adds what training keeps of them.

    Args:
        ledger: the ledger.
        width: bytes of an activation's element.
        by: key of the technique.
        kernels: of an operator, by phase; empty where it is one kernel.
        kept: for the backward, beyond the ledger.
    """

    def slower(item: Stream) -> Item | None:
        phase = kernels(item).get(item.phase)
        if phase is None:
            return None
        return item.but(bytes_per_element=phase.bytes_per_element(width), launches=phase.launches, by=by)

    training = any(item.phase == "backward" for item in ledger.items)
    return ledger.edit(Stream, slower).add(kept if training else ())
