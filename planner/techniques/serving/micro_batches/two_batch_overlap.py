"""Two-batch overlap: an iteration's batch in two halves, of which one computes while the other's tokens travel to experts.

What it does: layers whose tokens travel to experts run once for each half, one half two of a layer's five stages behind the
    other: a half's tokens go out beside its shared experts and what the other multiplies before its scores, and come back beside
    the other's scores, output and router. Experts run beside nothing.
Saves: of both exchanges, what that work hides.
Costs: weights are read twice and products have half the rows, so that small batches lose; parts side by side slow each other. It
    adds a fifth to a search's time: no plan has it unasked.
Assumes: SGLang's order of generating iterations for prompts as well, whose own order, and vLLM's, hide more (DeepSeek-V3 on 32
    H100, 8,192 prompt tokens a rank: 27 to 35 %, here 24 %); halves of equal work; other layers and both ends of the model run
    once, for all tokens; activations of both halves are held; every iteration is split, however small (engines have thresholds,
    as vLLM's ``--dbo-decode-token-threshold``).
Source: DeepSeek-V3 (arXiv:2412.19437) §3.4; SGLang ``--enable-two-batch-overlap``: batch_overlap/operations_strategy.py
    (``tbo_delta_stages=2``); gains: lmsys.org/blog/2025-05-05-large-scale-ep.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.ledger import BATCH_ROLES, PART, Collective, Item, Ledger, Resident, role
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.experts.spread import mixtures
from planner.techniques.serving.runs import Pass

_SIZES = (
    "m",
    "n",
    "k",
    "groups",
    "batch",
    "heads",
    "kv_heads",
    "q",
    "kv",
    "qk_dim",
    "v_dim",
    "visible",
    "size",
    "calls",
)
_NAME = re.compile(r"[^*/+ ]+")
# In which windows a layer's parts run, once for each half; experts run beside nothing.
_WINDOWS = {
    "prepare": (0, 2),
    "shared": (0, 2),
    "dispatch": (0, 2),
    "core": (1, 3),
    "combine": (1, 3),
    "experts": (4, 5),
}
# What comes before a layer's scores: the half that waits for its dispatch is one stage ahead of it.
_PREPARES = {"norm1"} | {
    f"attention.{name}"
    for name in (
        "q",
        "qkv",
        "qk_norm",
        "q_down",
        "q_norm",
        "q_up",
        "kv_down",
        "kv_norm",
        "kv_up",
        "rope",
        "absorb_query",
    )
}


def valid(ctx: ServingContext) -> Iterable[Check]:
    """There is an exchange to hide, and each rank has all of a prompt."""
    yield Check("two halves of a batch without an exchange of tokens", exchanged(ctx))
    yield Check("two halves of a batch whose prompts ranks share", ctx.mesh.cp == 1)


def exchanged(ctx: ServingContext) -> NDArray[np.bool_] | bool:
    """Where tokens travel to experts."""
    return ctx.knobs["experts"] == "exchanged" and bool(mixtures(ctx)) and ctx.mesh.dp > 1


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Runs every item of a layer with experts in two windows, with the sizes of a half."""
    blocks, items = set(mixtures(ctx)), []
    for item in ledger.items:
        if isinstance(item, Resident) or item.block not in blocks:
            items.append(item)
            continue
        part = _part(item)
        track = "exchange" if isinstance(item, Collective) and part in ("dispatch", "combine") else "main"
        half = item.but(by=TECHNIQUE.key, track=track, **_halved(item))
        items += [replace(half, window=f"half.{k}.{item.block}") for k in _WINDOWS[part]]
    return replace(ledger, items=tuple(items))


def _part(item: Item) -> str:
    """To which part of a layer an item belongs."""
    if item.what in ("moe.dispatch", "moe.combine"):
        return item.what.removeprefix("moe.")
    if "shared_expert" in item.tags:
        return "shared"
    if item.what in _PREPARES:
        return "prepare"
    return "experts" if "moe" in item.tags and item.what != "moe.router" else "core"


def _halved(item: Item) -> dict[str, Any]:
    """An item's sizes, of a part of the batch."""
    known = {field.name for field in fields(item)}
    sizes = {name: getattr(item, name) for name in _SIZES if name in known}
    return {name: _of_part(size) for name, size in sizes.items() if size is not None}


@lru_cache(maxsize=1024)
def _of_part(size: str) -> str:
    def name(found: re.Match[str]) -> str:
        return f"{PART}{found[0]}" if role(found[0]) in BATCH_ROLES else found[0]

    return _NAME.sub(name, size)


def _beside(subject: Pass) -> float:
    """Times that a layer's scores run beside an exchange in an iteration of DeepSeek-V3."""
    case: dict[str, Any] = {
        "model": "deepseek-v3",
        "dp": 8,
        "ep": 8,
        "decodes": 512.0,
        "experts": "exchanged",
    }
    ledger = runs.run("micro_batches", subject, **case)
    beside = {item.window for item in ledger.items if item.track == "exchange"}
    return float(sum(item.what == "attention.decode" and item.window in beside for item in ledger.items))


TECHNIQUE = Technique(
    key="two_batch_overlap",
    name="Two-/dual-batch overlap, sub-batch interleaving, NanoFlow",
    slot="micro_batches",
    job="serving",
    choices=("2",),
    searched=False,
    source="arXiv:2412.19437",
    summary="One half of a batch computes while the other's tokens travel to experts",
    knobs=(Knob("micro_batches", "parts of a batch that take turns", ("1", "2")),),
    figures=(
        Figure(
            "times that a layer's scores run, each beside an exchange: those of one half, while the other's tokens come back",
            2.0,
            1e-9,
            "SGLang batch_overlap/operations_strategy.py: _compute_moe_deepseek_blog_decode",
            _beside,
        ),
    ),
    valid=valid,
    apply=apply,
    active=exchanged,
)
TECHNIQUES = (
    Technique(
        key="whole_batch",
        name="A batch as a whole",
        kind="baseline",
        slot="micro_batches",
        job="serving",
        choices=("1",),
        default=True,
        source="arXiv:1909.08053",
        summary="All tokens of an iteration pass a layer together",
    ),
    TECHNIQUE,
)
