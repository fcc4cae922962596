"""What operators cost that run as kernels of their own, in passes over their elements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from planner.ledger import Item, Ledger, Resident, Stream

__all__ = ["Kernels", "run_apart"]


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
