"""Collects the items of one block kind: operators are written once and become forward, backward and saved tensors.

Amounts are expressions over axes; axes of a block are qualified with its name. Bytes are those of fp32: a precision pass
scales them by tag.
"""

from __future__ import annotations

from collections import Counter

from planner.ledger import Array, Item, Matmul, Phase, Resident, Stream
from planner.specs.model import Model

__all__ = ["ENCODER", "MASK", "NORM", "NORM_BACKWARD", "Graph"]

ENCODER = "encoder."
"""Prefix of the names of block kinds that run on the encoder's tokens."""

# Passes of a memory-bound kernel over an activation: reads and writes.
NORM, NORM_BACKWARD = 2.0, 3.0  # x -> y; (dy, x) -> dx
_ADD, _ADD_BACKWARD = 3.0, 1.0  # (x, residual) -> sum; the gradient is passed on, and summed once
MASK = 0.5  # of dropout: a byte, beside elements of two; written forward, read backward
_DROPPED_BACKWARD = 2.0 + MASK  # the sum's gradient is read, and masked for what was dropped
_GAINS = {"rmsnorm": 1, "layernorm": 2, "layernorm_nobias": 1, "none": 0}  # weights per element of width


class Graph:
    """Items and axes of one block kind of a model.

    Attributes:
        name: the block kind, as in ``Item.block``.
        model: the model that it belongs to.
        training: whether there is a backward pass.
        seq: the axis of tokens per sequence; ``kv_seq`` that of keys, ``residual_seq`` that of the residual stream.
        tokens: tokens of the residual stream, ``rows`` of everything between two residuals.
        residual: elements of the residual stream.
        sizes: axes that were declared.
    """

    def __init__(self, name: str, model: Model, *, training: bool) -> None:
        self.name = name
        self.model = model
        self.training = training
        prefix = "encoder_" if name.startswith(ENCODER) else ""
        self.seq, self.kv_seq, self.residual_seq = (
            f"{prefix}{axis}" for axis in ("seq", "kv_seq", "residual_seq")
        )
        self.rows = f"batch*{self.seq}"
        self.tokens = f"batch*{self.residual_seq}"
        self.residual = f"{self.tokens}*hidden"
        self.sizes: dict[str, Array | float] = {}
        self._items: list[Item] = []
        self._weights: dict[str, list[str]] = {}

    def axis(self, name: str, size: float, region: str = "") -> str:
        """Declares an axis of this block and returns its qualified name; ``region`` tells parts of one block apart."""
        axis = f"{name}@{self.name}" + (f".{region}" if region else "")
        self.sizes[axis] = float(size)
        return axis

    def weight(self, *sizes: str, mesh: str = "dense") -> None:
        """Weights on a mesh: ``dense``, ``expert``, or ``tied`` (a copy of another block's, gradients summed with it)."""
        self._weights.setdefault(mesh, []).extend(sizes)

    # -- kernels -----------------------------------------------------------------------------------------------------

    def matmul(
        self, what: str, m: str, n: str, k: str, tags: set[str], groups: str = "1", *, grouped: bool = False,
        out_bytes: float | None = None, weights: bool = True, input_gradient: bool = True,
    ) -> None:  # fmt: skip
        """A product of (m, k) by (k, n) and its two backward products: the gradients of its input and of its weights.

        Without ``weights``, both operands are activations; without ``input_gradient``, nothing trained made the input.
        """
        products: list[tuple[Phase, str, str, str, float | None]] = [("forward", m, n, k, out_bytes)]
        if self.training and input_gradient:
            products.append(("backward", m, k, n, None))
        if self.training:
            products.append(("weight" if weights else "backward", k, n, m, None))
        self._items += [
            Matmul(
                what=what, block=self.name, phase=phase, tags=frozenset(tags | {"gemm"}), m=rows, n=columns, k=depth,
                groups=groups, grouped=grouped, out_bytes=width,
            )
            for phase, rows, columns, depth, width in products
        ]  # fmt: skip

    def stream(
        self, what: str, size: str, forward: float, backward: float, *, tags: set[str],
        launches: tuple[float, float] = (1.0, 1.0), flop: float = 0.0, products: tuple[float, float] = (0.0, 0.0),
        kind: str = "activation", calls: tuple[str | None, str | None] = (None, None),
    ) -> None:  # fmt: skip
        """A memory-bound kernel and its backward (twice the ``flop``), in passes over ``size`` elements of 4 bytes.

        ``launches`` and FLOP of small ``products`` are those of either; ``calls`` the kernels that the host issues for it, where
        they are many.
        """
        phases: tuple[tuple[Phase, float, float], ...] = (
            ("forward", forward, flop),
            ("backward", backward, 2 * flop),
        )
        for (phase, passes, work), kernels, product_flop, issued in zip(
            phases, launches, products, calls, strict=True
        ):
            if phase == "forward" or self.training:
                self._items.append(
                    Stream(
                        what=what, block=self.name, phase=phase, tags=frozenset(tags | {kind}), size=size,
                        bytes_per_element=4.0 * passes, launches=kernels, flop_per_element=work,
                        product_flop_per_element=product_flop, calls=issued,
                    )
                )  # fmt: skip

    def norm(self, what: str, kind: str, *regions: str, size: str | None = None) -> None:
        """A norm of hidden width that keeps its input, made in ``regions`` (none: something else keeps it already)."""
        size = self.residual if size is None else size
        self.stream(what, size, NORM, NORM_BACKWARD, tags={"norm"})
        if regions:
            self.save(f"{what}.input", size, *regions)
        self.weight(*["hidden"] * _GAINS[kind])

    def add(self, what: str) -> None:
        """Bias, dropout and residual addition, fused as every framework does."""
        dropped = self.model.dropout
        forward = _ADD + MASK if dropped else _ADD
        backward = _ADD_BACKWARD + _DROPPED_BACKWARD if dropped else _ADD_BACKWARD
        self.stream(f"{what}.add", self.residual, forward, backward, tags={"add"})
        if dropped:
            self.save(f"{what}.dropout_mask", self.residual, "add", mask=True)

    # -- what is held --------------------------------------------------------------------------------------------------

    def save(self, what: str, size: str, *regions: str, mask: bool = False) -> None:
        """A tensor kept from forward to backward, produced in the first region (and inside the others)."""
        if self.training:
            tags = {"saved", *regions, *(() if mask else ("activation",))}
            self._hold(what, size, 1.0 if mask else 4.0, "activations", "micro_batch", tags)

    def transient(self, what: str, size: str, pool: str, *tags: str) -> None:
        """A tensor that lives only while the block is at work."""
        self._hold(what, size, 4.0, pool, "block", set(tags))

    def gradient(self, what: str, size: str) -> None:
        """The gradient of an activation, where it adds to what the block holds while its backward is at work."""
        if self.training:
            self.transient(f"{what}.gradient", size, "workspace", "activation", "gradient")

    def cache(self, what: str, size: str) -> None:
        """What inference keeps of the tokens it has seen."""
        if not self.training:
            self._hold(what, size, 4.0, "kv_cache", "always", {"kv_cache", "activation"})

    def finish(self) -> list[Item]:
        """All items, with the weights (and in training their gradients) summed per mesh."""
        for mesh, sizes in self._weights.items():
            for pool in ("parameters", "gradients") if self.training else ("parameters",):
                if sizes:
                    self._hold(f"{mesh}_{pool}", _sum(sizes), 4.0, pool, "always", {pool, mesh})
        return self._items

    def _hold(self, what: str, size: str, width: float, pool: str, lifetime: str, tags: set[str]) -> None:
        self._items.append(
            Resident(
                what=what, block=self.name, tags=frozenset(tags), size=size, bytes_per_element=width, pool=pool,
                lifetime=lifetime,
            )
        )  # fmt: skip


def _sum(sizes: list[str]) -> str:
    """A sum of terms, equal terms counted together."""
    counts = Counter(term for size in sizes for term in size.split(" + "))
    return " + ".join(term if count == 1 else f"{count}*{term}" for term, count in counts.items())
