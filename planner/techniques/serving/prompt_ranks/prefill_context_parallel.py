"""Prefill context parallelism: ``cp`` ranks share the tokens of every prompt, and meet each other's keys and values.

What it does: each rank runs all layers for its share of a prompt's tokens, dealt in zig-zag so that causal work is even. With
    ``all_gather`` the new keys and values are collected before attention, and every rank keeps the whole cache (vLLM's
    ``--prefill-context-parallel-size``, SGLang's ``--attn-cp-size``); with ``pass_kv`` they go round a ring beside attention on
    the block at hand, and a rank keeps its own part (Meta's engine).
Saves: a prompt's time, divided by cp, for a fraction of tensor parallelism's traffic: keys and values of few heads once per
    layer, not hidden states twice. Experts are spread over these ranks too.
Costs: weights of attention and dense networks on every one of the ranks. Generation gains nothing: it is a choice of pools of
    prompts.
Assumes: prompts are long against cp; of latents, the latent is what is gathered; earlier chunks' keys are in every rank's cache
    (``all_gather``), or pass by again (``pass_kv``).
Source: Yang et al. 2024 (arXiv:2411.01783), sections 3.5 and 4.2; vLLM 0.32, ``v1/worker/gpu/pcp_manager.py``; SGLang 0.5.23,
    docs/advanced_features/prefill_cp.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from planner.ledger import AttentionCore, Collective, Item, Ledger, Resident, times
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_RANKS, _DISTANT, _PART = "prompt_ranks", "distant_ranks", "prompt_part"


def alone(ctx: ServingContext) -> Iterable[Check]:
    """Without an exchange, no rank has a part of a prompt."""
    yield Check("a prompt's tokens on several ranks that exchange no keys", ctx.mesh.cp == 1)


def valid(ctx: ServingContext) -> Iterable[Check]:
    """Several ranks, and attention that sees all keys alike."""
    yield Check("keys exchanged by a single rank", ctx.mesh.cp > 1)
    specs = [block.attention for block in ctx.model.blocks.values()]
    plain = all(spec is not None and not spec.window for spec in specs)
    yield Check("context parallelism of windows or recurrent mixers", plain)
    chosen = any(spec is not None and spec.index_heads for spec in specs)
    ring = ctx.knobs["prompt_ranks"] == "pass_kv"
    yield Check("a ring of keys of which an indexer chooses some", not (ring and chosen))


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Adds what brings keys and values together; the batch's tokens are dealt to the ranks by the composition."""
    cp = ctx.mesh.cp
    ledger = ledger.set_axes(**{_RANKS: cp, _DISTANT: cp - 1.0, _PART: 1.0 / cp})
    return _gathered(ledger, ctx) if ctx.knobs["prompt_ranks"] == "all_gather" else _passed(ledger, ctx)


def _gathered(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """The new tokens of all ranks, before attention."""
    tokens = f"prefill_tokens*{_RANKS}"
    return ledger.add([_exchange(ctx, cache, "gather_kv", "all_gather", tokens) for cache in _caches(ledger)])


def _passed(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Blocks of keys go round beside attention on the one at hand; the first is the rank's own and hides nothing."""
    added: list[Item] = []

    def core(item: AttentionCore) -> Item | None:
        if item.decode:
            return None
        others = times(item.kv, f"{_DISTANT}*{_PART}")
        added.append(
            item.but(what=f"{item.what}.distant", kv=others, by=TECHNIQUE.key, window=f"ring.{item.block}")
        )
        return item.but(kv=times(item.kv, _PART), by=TECHNIQUE.key)

    def cached(item: Resident) -> Item | None:
        whole = item.pool != "kv_cache" or item.what == "ssm.state"
        return None if whole else item.but(size=times(item.size, _PART), by=TECHNIQUE.key)

    for cache in _caches(ledger):
        tokens, window = f"context_keys@{cache.block}*{_DISTANT}*{_PART}", f"ring.{cache.block}"
        added.append(_exchange(ctx, cache, "pass_kv", "point_to_point", tokens, window=window, track="ring"))
        ledger = ledger.cut(window, np.maximum(ctx.mesh.cp - 1.0, 1.0))
    return ledger.edit(AttentionCore, core).edit(Resident, cached).add(added)


def _caches(ledger: Ledger) -> list[Resident]:
    return [item for item in ledger.of(Resident, pool="kv_cache") if item.what != "ssm.state"]


def _exchange(
    ctx: ServingContext, cache: Resident, what: str, kind: str, tokens: str, **more: Any
) -> Collective:
    """Keys and values of some tokens, as they are computed."""
    size = times(times(cache.size, tokens), "/kv_seq")
    return Collective(
        what=f"attention.{what}", block=cache.block, tags=frozenset({"cp"}), by=TECHNIQUE.key, source=TECHNIQUE.source,
        kind=kind, group=ctx.mesh.group("cp"), size=size, dtype=ctx.format.activation, **more,
    )  # fmt: skip


def _passed_elements(subject: Pass) -> float:
    """Elements that a node of Llama 3 405B sends per layer and prompt token, one of 4."""
    case: dict[str, Any] = {"model": "llama3.1-405b", "tp": 8, "cp": 4, "prefill": 128000.0, "decodes": 0.0}
    ledger = runs.run("prompt_ranks", subject, prompt_ranks="pass_kv", **case)
    return 8.0 * runs.sent_elements(ledger, "cp") / 128000.0


TECHNIQUE = Technique(
    key="prefill_context_parallel",
    name="Prefill context parallelism (pass-KV ring, or gathered keys)",
    slot="prompt_ranks",
    job="serving",
    choices=("all_gather", "pass_kv"),
    source="arXiv:2411.01783",
    summary="Ranks of a pool of prompts share every prompt's tokens",
    knobs=(
        Knob("cp", "context-parallel degree of a pool of prompts"),
        Knob("prompt_ranks", "how these ranks meet each other's keys", ("alone", "all_gather", "pass_kv")),
    ),
    figures=(
        Figure(
            "elements of keys and values that a node of 4 sends per layer and token of Llama 3 405B: 3/4 of 2·D·N_KV/N_H",
            0.75 * 2.0 * 16384.0 * 8.0 / 128.0,
            1e-9,
            "Yang et al. 2024 (arXiv:2411.01783), Table 3: KV bytes 2·T·D·(N_KV/N_H)·e; section 3.5.2: passed N − 1 times",
            _passed_elements,
        ),
    ),
    valid=valid,
    apply=apply,
    searched=False,
)
TECHNIQUES = (
    Technique(
        key="whole_prompts",
        name="Prompts whole on every rank",
        kind="baseline",
        slot="prompt_ranks",
        job="serving",
        choices=("alone",),
        default=True,
        source="arXiv:1909.08053",
        summary="Every rank of an attention group runs all of a prompt's tokens",
        valid=alone,
    ),
    TECHNIQUE,
)
