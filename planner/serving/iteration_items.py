"""Every second of an iteration by item: what it is, which technique put it there, and where its formula comes from."""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.ledger import Resident
from planner.serving.composition import Composition
from planner.serving.iteration import Iterations
from planner.serving.speculation import Speculating

__all__ = ["item", "iteration_items", "kernel_items", "largest_first"]


def item(what: str, by: str, source: str, seconds: float, block: str = "") -> dict[str, Any]:
    """One item of an iteration."""
    return {"what": what, "block": block, "by": by, "source": source, "seconds": seconds}


def kernel_items(batch: Composition, iterations: Iterations) -> list[dict[str, Any]]:
    """What devices compute and send in an iteration of one batch, all layers together."""
    ledger = iterations.sized(batch, captured=bool(batch.prefill_tokens[0] <= 0.0))
    items = [i for i in ledger.items if not isinstance(i, Resident)]
    repeats = iterations.repeats()
    slowdown = iterations.prompt_slowdown if batch.prefill_tokens[0] > 0.0 else 1.0
    prices = iterations.pricer.prices(items, ledger.axes)
    return [
        item(i.what, i.by, i.source, float(np.ravel(price)[0]) * repeats.get(i.block, 1) * slowdown, i.block)
        for i, price in zip(items, prices, strict=True)
    ]


def largest_first(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items that take time, the largest first."""
    return sorted((i for i in items if i["seconds"] > 0.0), key=lambda i: -float(i["seconds"]))


def iteration_items(name: str, batch: Composition, iterations: Iterations) -> dict[str, Any]:
    """One iteration: its seconds, and those of its items, the largest first."""
    items, host = kernel_items(batch, iterations), iterations.software
    if isinstance(iterations, Speculating):
        draft_s = float(iterations.draft_s(batch)[0])
        items.append(item("draft", "speculation", "arXiv:2211.17192", draft_s))
    host_s = float(iterations.ctx.mesh.pp[0] * iterations.host_s(batch)[0])
    items.append(item("host", "stack", host.iteration_s.source, host_s))
    return {
        "name": name,
        "decodes": float(batch.decodes[0]),
        "prefill_tokens": float(batch.prefill_tokens[0]),
        "seconds": float(iterations.seconds(batch)[0]),
        "items": largest_first(items),
    }
