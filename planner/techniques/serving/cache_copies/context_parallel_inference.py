"""Decode context parallelism: ranks that would hold the same keys and values hold every so-manieth token instead.

What it does: where tensor parallelism copies key heads (more ranks than heads, or a latent that is whole on every rank), the
    copies are split over the context. Generation gathers its queries, each rank attends to its own tokens for all heads of the
    group, and partial outputs are weighed by their log-sum-exp and summed where their heads belong.
Saves: the cache, divided by the copies; as many times the tokens fit, and each step reads a part of them.
Costs: an all-gather of queries, one of sums and a reduce-scatter of outputs per layer of every generating step.
Assumes: as many parts as there were copies (``dcp = tp/key heads``); a prompt's chunks find earlier ones gathered at no cost,
    which is small beside its products; caches that grow with the context only.
Source: vLLM, docs/serving/context_parallel_deployment.md (``--decode-context-parallel-size``); SGLang,
    docs/advanced_features/dcp.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from planner.ledger import Array, AttentionCore, Collective, Item, Ledger, Resident, times
from planner.mesh import Mesh
from planner.specs.model import Model
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_COPIES, _PART = "kv_copies", "kv_part"


def copies(model: Model, mesh: Mesh) -> Array:
    """Ranks of a tensor group that would hold the same keys and values, per row; the least of all kinds of blocks."""
    specs = [block.attention for block in model.blocks.values() if block.attention is not None]
    heads = max((1 if spec.latent else spec.kv_heads for spec in specs), default=1)
    return np.asarray(np.maximum(mesh.tp / heads, 1.0))


def valid(ctx: ServingContext) -> Iterable[Check]:
    """Engines that split caches, of models whose caches grow with the context, where there are copies."""
    specs = [block.attention for block in ctx.model.blocks.values()]
    kinds = "" if ctx.stack.serving is None else ctx.stack.serving.context_parallel
    latent = all(spec is not None and spec.latent for spec in specs)
    yield Check(
        f"{ctx.stack.name} does not split such a cache over tensor ranks",
        kinds == "any" or (kinds == "latent" and latent),
    )
    grows = all(spec is not None and not spec.window and not spec.index_heads for spec in specs)
    yield Check("a cache split over ranks with windows, sparse keys or recurrent mixers", grows)
    yield Check("a cache split over ranks that hold no copies", copies(ctx.model, ctx.mesh) > 1.0)


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Gives every copy its part of the tokens, and generation all heads of its group and three exchanges."""
    count = copies(ctx.model, ctx.mesh)
    group = ctx.mesh.subgroup("tp", "dcp", count, inner=True)
    added: list[Item] = []

    def cache(item: Resident) -> Item | None:
        return item.but(size=times(item.size, _PART), by=TECHNIQUE.key) if item.pool == "kv_cache" else None

    def core(item: AttentionCore) -> Item | None:
        if not item.decode:
            return None
        added.extend(_exchanges(item, group, ctx.format.activation))
        return item.but(heads=times(item.heads, _COPIES), kv=times(item.kv, _PART), by=TECHNIQUE.key)

    ledger = ledger.set_axes(**{_COPIES: count, _PART: 1.0 / count})
    return ledger.edit(Resident, cache).edit(AttentionCore, core).add(added)


def _exchanges(core: AttentionCore, group: Any, dtype: str) -> Iterator[Collective]:
    """Queries to all ranks, sums of exponentials to all, outputs to where their heads belong."""
    rows = times(times(f"{core.batch}*{core.q}", core.heads), _COPIES)
    for what, kind, size, number in (
        ("query.all_gather", "all_gather", times(rows, core.qk_dim), dtype),
        ("sums.all_gather", "all_gather", times(rows, _COPIES), "fp32"),
        ("output.reduce_scatter", "reduce_scatter", times(rows, core.v_dim), dtype),
    ):
        yield Collective(
            what=f"attention.{what}", block=core.block, tags=frozenset({"cp"}), by=TECHNIQUE.key, source=TECHNIQUE.source,
            kind=kind, group=group, size=size, dtype=number,
        )  # fmt: skip


def _tokens(subject: Pass) -> float:
    """Tokens whose caches fit into 46.80 GiB on each of 8 devices: Kimi K2's latents, as many as DeepSeek-V3's."""
    each = runs.cache_bytes_per_token(runs.run("cache_copies", subject, model="kimi-k2", tp=8))
    return 46.80 * 2**30 / each


_LOGS = "vllm-project/recipes, moonshotai/Kimi-K2-Think.md: start-up logs of Kimi-K2-Thinking on 8 H200"
TECHNIQUE = Technique(
    key="context_parallel_inference",
    name="Context/sequence parallel inference (Long-VITA, TokenRing, ring/DCP)",
    slot="cache_copies",
    job="serving",
    choices=("dcp",),
    source="vLLM, docs/serving/context_parallel_deployment.md",
    summary="Ranks that would copy a cache split its tokens",
    knobs=(Knob("cache_copies", "what tensor ranks hold of the same keys and values", ("kept", "dcp")),),
    figures=(
        Figure(
            "tokens in the caches, 46.80 GiB on each of 8 ranks, split over all",
            5721088.0,
            1e-3,
            _LOGS,
            _tokens,
        ),
    ),
    valid=valid,
    apply=apply,
    searched=False,
)
TECHNIQUES = (
    Technique(
        key="copied_cache",
        name="Caches whole on every tensor rank",
        kind="baseline",
        slot="cache_copies",
        job="serving",
        choices=("kept",),
        default=True,
        source="arXiv:1909.08053",
        summary="Key heads that ranks share are held by each",
    ),
    TECHNIQUE,
)
