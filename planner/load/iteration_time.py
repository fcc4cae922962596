"""How long an iteration takes, given what it holds: the one thing that every level of load knows of a model and its devices.

An iteration holds ``n`` requests that decode a token each and ``m`` prompt tokens in chunks. What attention costs is in
two sums: over the decodes of the tokens that each attends to, and over the prompt tokens of the same. At fixed ``n`` and ``m``
the time is affine in both sums, since attention kernels read and multiply in proportion to them: :meth:`IterationTime.line`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Affine", "Array", "IterationTime", "Price", "Sampled", "chunk_context_tokens"]

Array: TypeAlias = npt.NDArray[Any]
Price: TypeAlias = Callable[[Array, Array, Array, Array], Array]
"""Seconds of iterations by decodes, the tokens they attend to, prompt tokens, the tokens they attend to; all broadcast."""


class IterationTime(Protocol):
    """A :data:`Price` that can also be asked for one composition at a time, fast."""

    def __call__(
        self, decodes: Any, context_tokens: Any, prefill_tokens: Any, prefill_context_tokens: Any
    ) -> Array:
        """Seconds of iterations; the arguments broadcast."""
        ...

    def line(self, decodes: int, prefill_tokens: int) -> tuple[float, float, float]:
        """Seconds at this composition as ``(base, per context token, per prefill context token)``."""
        ...


@dataclass(frozen=True, slots=True)
class Affine:
    """``a + b·n + d·K + c·m + e·A``: numbers for one pool, columns for many.

    ``base_s`` is what every iteration pays: weights read, launches, latencies.

    >>> round(float(Affine(12e-3, 60e-6, 0.0, 90e-6)(10, 10_000, 500, 0)), 4)
    0.0576
    """

    base_s: Any
    per_decode_s: Any = 0.0
    per_context_token_s: Any = 0.0
    per_prefill_token_s: Any = 0.0
    per_prefill_context_token_s: Any = 0.0

    def __call__(
        self, decodes: Any, context_tokens: Any, prefill_tokens: Any, prefill_context_tokens: Any
    ) -> Array:
        """Seconds of iterations; the arguments broadcast with the coefficients."""
        seconds: Array = (
            np.asarray(self.base_s)
            + np.multiply(self.per_decode_s, decodes)
            + np.multiply(self.per_context_token_s, context_tokens)
            + np.multiply(self.per_prefill_token_s, prefill_tokens)
            + np.multiply(self.per_prefill_context_token_s, prefill_context_tokens)
        )
        return seconds

    def line(self, decodes: int, prefill_tokens: int) -> tuple[float, float, float]:
        """Seconds at this composition as ``(base, per context token, per prefill context token)``."""
        base_s = self.base_s + self.per_decode_s * decodes + self.per_prefill_token_s * prefill_tokens
        return base_s, self.per_context_token_s, self.per_prefill_context_token_s


@dataclass(frozen=True, slots=True)
class Sampled:
    """Any price of one pool as a table over (decodes, prompt tokens), bilinear in between and affine in the contexts.

    Attributes:
        decodes, prefill_tokens: the nodes, ascending.
        lines: (decodes, prefill tokens, 3): base seconds, seconds per context token and per prefill context token.
    """

    decodes: tuple[float, ...]
    prefill_tokens: tuple[float, ...]
    lines: Array
    _known: dict[tuple[int, int], tuple[float, float, float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        price: Price,
        max_decodes: int,
        max_prefill_tokens: int,
        context_tokens: float = 4096.0,
        nodes: tuple[int, int] = (48, 144),
    ) -> Sampled:
        """Asks the price once, for all nodes together.

        Args:
            max_decodes: requests of an iteration, at most.
            max_prefill_tokens: prompt tokens of an iteration, at most.
            context_tokens: a typical context; the slopes are taken between a quarter of it and twice as much.
            nodes: of decodes and of prompt tokens, at most.
        """
        n, m = np.meshgrid(_nodes(max_decodes, nodes[0]), _nodes(max_prefill_tokens, nodes[1]), indexing="ij")
        short, long = context_tokens / 4.0, context_tokens * 2.0
        contexts = np.array([[short, short], [long, short], [short, long]]).reshape(3, 2, 1, 1)
        occupied = n + m > 0  # an empty iteration is never run, and a price need not know it
        seconds = price(
            np.where(occupied, n, 1.0) * np.ones((3, 1, 1)),
            np.where(occupied, n, 1.0) * contexts[:, 0],
            m * np.ones((3, 1, 1)),
            m * contexts[:, 1],
        )
        per_context = (seconds[1] - seconds[0]) / np.maximum(n * (long - short), 1.0)
        per_prefill_context = (seconds[2] - seconds[0]) / np.maximum(m * (long - short), 1.0)
        # Beside nothing there is nothing to attend to; half of one costs as much per token as one does.
        per_context[0], per_prefill_context[:, 0] = per_context[1], per_prefill_context[:, 1]
        base = seconds[0] - per_context * n * short - per_prefill_context * m * short
        lines = np.stack([base, per_context, per_prefill_context], axis=-1)
        return cls(tuple(n[:, 0].tolist()), tuple(m[0].tolist()), lines)

    def __call__(
        self, decodes: Any, context_tokens: Any, prefill_tokens: Any, prefill_context_tokens: Any
    ) -> Array:
        """Seconds of iterations; the arguments broadcast."""
        n, m = np.asarray(decodes, dtype=float), np.asarray(prefill_tokens, dtype=float)
        i, u = _cell(np.asarray(self.decodes), n)
        j, v = _cell(np.asarray(self.prefill_tokens), m)
        at = self.lines
        line = (1 - u)[..., None] * ((1 - v)[..., None] * at[i, j] + v[..., None] * at[i, j + 1])
        line = line + u[..., None] * ((1 - v)[..., None] * at[i + 1, j] + v[..., None] * at[i + 1, j + 1])
        seconds: Array = (
            line[..., 0] + line[..., 1] * context_tokens + line[..., 2] * np.asarray(prefill_context_tokens)
        )
        return seconds

    def line(self, decodes: int, prefill_tokens: int) -> tuple[float, float, float]:
        """Seconds at this composition as ``(base, per context token, per prefill context token)``."""
        found = self._known.get((decodes, prefill_tokens))
        if found is None:
            i = min(max(bisect_right(self.decodes, decodes) - 1, 0), len(self.decodes) - 2)
            j = min(
                max(bisect_right(self.prefill_tokens, prefill_tokens) - 1, 0), len(self.prefill_tokens) - 2
            )
            u = (decodes - self.decodes[i]) / (self.decodes[i + 1] - self.decodes[i])
            v = (prefill_tokens - self.prefill_tokens[j]) / (
                self.prefill_tokens[j + 1] - self.prefill_tokens[j]
            )
            cell = self.lines[i : i + 2, j : j + 2]
            a, b, c = np.einsum("i,j,ijk->k", [1 - u, u], [1 - v, v], cell).tolist()
            found = self._known[decodes, prefill_tokens] = (a, b, c)
        return found


def chunk_context_tokens(chunk_tokens: Any, cached_tokens: Any) -> Any:
    """Tokens that a chunk of a prompt attends to, summed over its own: ``c·s + c(c + 1)/2`` after ``s`` cached ones.

    >>> chunk_context_tokens(3, 10)  # 11 + 12 + 13
    36.0
    """
    return chunk_tokens * (cached_tokens + (chunk_tokens + 1) / 2)


def _nodes(most: int, count: int) -> Array:
    """0, 1, 2 … and then in equal ratios, up to ``most``; tiles of matrix products make fine steps over prompt tokens."""
    growing = np.unique(np.round(np.geomspace(1.0, max(most, 2), count)))
    return np.concatenate([[0.0], growing])


def _cell(nodes: Array, x: Array) -> tuple[Array, Array]:
    """The cell in which ``x`` lies, and how far into it; beyond the last node its line goes on."""
    i = np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, len(nodes) - 2)
    return i, (x - nodes[i]) / (nodes[i + 1] - nodes[i])
