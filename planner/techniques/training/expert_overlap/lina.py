"""Exchanges of tokens before gradients on the same link (Lina), in pieces that their experts work on one by one.

What it does: all-to-alls and the traffic of data parallelism beside them are cut into pieces of 30 MB, and a piece of that
    traffic starts only where no exchange is under way or waits; experts work on the tokens of one piece while the next travels.
Saves: what exchanges lose where they share a link with gradients or weights; the shorter of exchanges and experts' products, but
    for one piece.
Costs: the latency of every piece; an exchange waits for half of a piece of other traffic where one is under way.
Assumes: traffic that is sent once per step, as the last backward and the first forward are what it shares a link with; a piece of
    a product runs as efficiently as the whole; cutting and joining tensors is free (1 % of a step in the authors' runs). Two or
    four experts on a device, which the authors pack until these take as long as the exchange, are a smaller ``ep``.
Source: Li et al. 2023 (Lina, USENIX ATC, arXiv:2210.17223) §2.2, §4.2, §7.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Array, Collective, Item, Ledger, Matmul
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "lina"
_PIECE_BYTES = 30e6
"""Section 7.1: the size that keeps exchanges blocked for the shortest time in most of the authors' runs."""


def valid(ctx: Context) -> Iterable[Check]:
    """Something must travel to experts."""
    experts = any(block.moe is not None for block in ctx.model.blocks.values())
    yield Check("exchanges that go first need experts on several ranks (ep > 1)", experts & (ctx.mesh.ep > 1))
    travel = ctx.knobs["expert"] != "fetched"
    yield Check("exchanges that go first need tokens that travel to experts, not experts to tokens", travel)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Lets exchanges go first, and pairs them with their experts' products in windows of so many pieces."""
    pieces: dict[str, Array] = {}
    for item in ledger.of(Collective):
        if item.kind != "all_to_all":
            continue
        n_bytes = ledger.axes[item.size] * dtype_bytes(item.dtype)
        pieces[_window(item)] = np.maximum(n_bytes / _PIECE_BYTES, 1.0)

    def ahead(item: Item) -> Item | None:
        window = _window(item)
        if window not in pieces or item.window:
            return None
        if isinstance(item, Matmul) and "expert" in item.tags:
            return item.but(window=window)
        if not isinstance(item, Collective) or item.kind != "all_to_all":
            return None
        return item.but(
            window=window,
            track="exchange",
            messages=f"pieces@{window}",
            ahead_bytes=_PIECE_BYTES,
            by=_KEY,
        )

    ledger = ledger.edit(Item, ahead).set_axes(**{f"pieces@{window}": n for window, n in pieces.items()})
    for window, number in pieces.items():
        ledger = ledger.cut(window, number)
    return ledger


def _window(item: Item) -> str:
    return f"{_KEY}.{item.block}.{item.phase}"


def _slowdown(subject: Pass) -> float:
    """How many times as long as with the pass an all-to-all is under way while gradients are on its link."""
    from planner.engine.shared_links import slowdown

    taken = []
    for apply_ in (lambda ledger, ctx: ledger, subject):
        ledger, _ = figures.run("expert_overlap", apply_, model="mixtral-8x7b", dp=16, ep=8)
        taken.append(max(slowdown(item) for item in ledger.of(Collective) if item.kind == "all_to_all"))
    return taken[0] / taken[1]


TECHNIQUE = Technique(
    key=_KEY,
    name="Exchanges of tokens before gradients (Lina)",
    slot="expert_overlap",
    choices=("priority",),
    searched=False,  # no launcher of today has it
    source="arXiv:2210.17223",
    summary="All-to-alls go first on the link that gradients share, in pieces that experts work on one by one",
    figures=(
        Figure(
            "times as long as alone, of an all-to-all that shares its link with gradients: in the median of 1,500",
            1.83,
            0.095,  # two flows that share a link fairly take twice as long each
            "Li et al. 2023 (arXiv:2210.17223), section 2.2 and Figure 3",
            _slowdown,
        ),
    ),
    valid=valid,
    apply=apply,
)
