"""What operators cost that run as kernels of their own, in passes over their elements."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Kernels"]


@dataclass(frozen=True, slots=True)
class Kernels:
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
