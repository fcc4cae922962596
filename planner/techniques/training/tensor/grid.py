"""What the tensor layouts on grids of ranks share: both sides of every matrix are cut, and so is the batch.

A product of (m, k) by (k, n) has its rows cut with the batch and its columns with the width; blocks of its operands travel along
the rows and columns of the grid. Nothing is whole on any rank, so that sequence parallelism has nothing to shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from planner.ledger import Array, Collective, Group, Item, Ledger, Matmul, times
from planner.technique import Check, Context, Figure, Technique, off
from planner.techniques import figures
from planner.techniques.figures import Pass

__all__ = [
    "Lattice",
    "Operands",
    "checks",
    "dense",
    "edge",
    "lay",
    "matrices",
    "operands",
    "travel",
    "volume",
    "with_depth",
]

_WIDTHS = ("hidden", "heads", "kv_heads", "ffn", "vocab")


class Lattice(NamedTuple):
    """How ranks form a grid: of their number, ``shape`` makes parts of the batch and of every width (0 where there is no such
    grid); ``what`` is its name."""

    what: str
    shape: Callable[[Array], tuple[Array, Array]]

    def valid(self, ctx: Context) -> Iterable[Check]:
        """Whole blocks."""
        yield from checks(ctx, *self.shape(ctx.mesh.tp), self.what)

    def extents(self, ctx: Context) -> tuple[Array, Array]:
        """Parts of the batch and of a width, 1 where there is no grid."""
        rows, columns = self.shape(ctx.mesh.tp)
        return np.maximum(rows, 1.0), np.maximum(columns, 1.0)

    def technique(
        self,
        key: str,
        name: str,
        choice: str,
        source: str,
        summary: str,
        figure: tuple[str, float, str],
        batch: tuple[int, int],
        apply: Callable[[Ledger, Context], Ledger],
        active: Callable[[Array, Array], Any],
    ) -> Technique:
        """The entry of a layout on this lattice, with a layer's traffic on 64 ranks as its figure: what, how much, by whom.

        Args:
            batch: sequences and tokens of the figure.
            active: of rows and columns, where the layout is one of its own.
        """
        what, published, by = figure
        return Technique(
            key=key,
            name=name,
            slot="tensor",
            choices=(choice,),
            searched=False,  # weights travel in every product: it takes dozens of ranks and little weight per token to pay
            source=source,
            summary=summary,
            figures=(Figure(what, published, 1e-6, by, lambda subject: volume(subject, choice, *batch)),),
            valid=self.valid,
            apply=apply,
            active=lambda ctx: active(*self.shape(ctx.mesh.tp)) & dense(ctx),
        )


class Operands(NamedTuple):
    """Sizes of a product's left and right operand and of its result, as they lie in memory."""

    left: str
    right: str
    result: str


def edge(ranks: Array, power: int) -> Array:
    """The whole root of a number of ranks; 0 where there is none.

    >>> edge(np.array([4.0, 8.0, 64.0]), 2)
    array([2., 0., 8.])
    """
    root = np.rint(np.power(ranks, 1.0 / power))
    return np.asarray(np.where(root**power == ranks, root, 0.0))


def checks(ctx: Context, rows: Array, columns: Array, what: str) -> Iterable[Check]:
    """Whole blocks: the batch cut into ``rows`` parts, every width into ``columns``.

    ``columns`` is 0 where the ranks form no such grid.
    """
    yield Check(f"tp ranks form no {what}", columns > 0)
    columns = np.maximum(columns, 1.0)
    yield Check(
        f"micro-batch not divisible into the rows of a {what}",
        ctx.micro_batch_size % np.maximum(rows, 1.0) == 0,
    )
    yield Check(f"a {what} is laid out for dense layers alone", dense(ctx))
    for block in ctx.model.blocks.values():
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                yield Check(
                    f"attention heads not divisible by the edge of a {what}", attention.heads % columns == 0
                )
                yield Check(
                    f"KV heads not divisible by the edge of a {what}", attention.kv_heads % columns == 0
                )
        if block.mlp:
            yield Check(
                f"feed-forward width not divisible by the edge of a {what}", block.mlp.ffn % columns == 0
            )
    yield Check(f"hidden size not divisible by the edge of a {what}", ctx.model.hidden % columns == 0)
    apart = ctx.knobs["sequence_parallel"] == off("sequence_parallel")
    yield Check(f"a {what} leaves sequence parallelism nothing to shard", apart)
    yield Check(f"a {what} is not combined with context parallelism", ctx.mesh.cp == 1)


def dense(ctx: Context) -> bool:
    """Whether every layer is attention with keys and values, and one network."""
    blocks = ctx.model.blocks.values()
    return all(b.moe is None and b.ssm is None and not (b.attention and b.attention.latent) for b in blocks)


def matrices(ledger: Ledger) -> list[Matmul]:
    """Products of activations with weights, and those of their gradients."""
    return [item for item in ledger.of(Matmul) if "core_attn" not in item.tags]


def operands(item: Matmul) -> Operands:
    """Sizes of what a product reads and writes."""
    return Operands(_area(item.m, item.k), _area(item.k, item.n), _area(item.m, item.n))


def _area(rows: str, columns: str) -> str:
    """Elements of a matrix whose sides may be sums: queries, keys and values of one product."""
    return " + ".join(times(part, column) for column in columns.split(" + ") for part in rows.split(" + "))


def lay(ledger: Ledger, rows: Array, columns: Array, widen: Callable[[Matmul], Matmul]) -> Ledger:
    """Cuts the batch into ``rows`` and every width into ``columns``; ``widen`` restores what a rank's product works on."""
    cut = ledger.shard(batch=rows, **dict.fromkeys(_WIDTHS, columns))
    of_weights = {id(item) for item in matrices(cut)}
    return cut.edit(Matmul, lambda item: widen(item) if id(item) in of_weights else None)


def travel(item: Matmul, ctx: Context, what: str, kind: str, size: str, group: Group, by: str) -> Collective:
    """A block of an operand on its way."""
    return Collective(
        what=f"{item.what}.{what}", block=item.block, phase=item.phase, by=by, kind=kind,
        tags=(item.tags - {"gemm", "row", "column"}) | {"tp_grid"},
        group=group, size=size, dtype=ctx.format.activation,
    )  # fmt: skip


def widened(item: Matmul) -> Matmul:
    """A product whose inner dimension is walked block by block: all of it passes by."""
    return item.but(k=times(item.k, "grid_edge"))


def with_depth(ledger: Ledger, ctx: Context, rows: Array, columns: Array, by: str) -> Ledger:
    """SUMMA on ``columns`` × ``columns`` ranks, of which there are rows/columns layers with a part of the batch each.

    A block is broadcast along a tree of a row or column in log2(q) sends, in q steps of 1/q of what the row or column holds.
    """
    ledger = lay(ledger.set_axes(grid_edge=columns), rows, columns, widened)
    ledger = ledger.set_axes(grid_hops=np.log2(columns))
    along = ctx.mesh.subgroup("tp", "tp.row", columns, inner=True)
    across = Group("tp.column", columns, along.stride * columns)
    return ledger.add(_broadcasts(ledger, ctx, along, across, by))


def _broadcasts(ledger: Ledger, ctx: Context, along: Group, across: Group, by: str) -> Iterator[Item]:
    for item in matrices(ledger):
        sizes = operands(item)
        # What a product sums instead of reading is as large as the whole row or column of it.
        summed = times(sizes.result, "grid_edge")
        left = summed if item.phase == "backward" else sizes.left
        right = summed if item.phase == "weight" else sizes.right
        for what, size, group in (("row_blocks", left, along), ("column_blocks", right, across)):
            yield travel(item, ctx, what, "point_to_point", times(size, "grid_hops"), group, by)


def volume(subject: Pass, tensor: str, micro_batch_size: int, seq: int) -> float:
    """Elements that one of 64 ranks sends in a GPT-3 layer's forward, 24,576 tokens, in units of h²."""
    ledger, ctx = figures.run(
        "tensor", subject, model="gpt3-175b", tensor=tensor, tp=64, seq=seq, micro_batch_size=micro_batch_size,
        cluster="a100-sxm-80gb:8x8",
    )  # fmt: skip

    def of_a_layer(item: Collective) -> bool:
        return item.phase == "forward" and item.group.name.startswith("tp") and item.block == "dense"

    return figures.sent_elements(ledger, of_a_layer) / ctx.model.hidden**2
