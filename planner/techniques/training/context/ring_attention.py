"""Context parallelism: the sequence is split over ``cp`` ranks, and attention fetches the keys and values it lacks.

What it does: shards every token-wise operator by cp. ``p2p`` passes blocks of K and V around a ring while attention works on
    the previous block; ``all_gather`` collects K and V before attention.
Saves: activations and token-wise work, divided by cp.
Costs: 2·b·s·h_kv·(cp−1)/cp elements forward (K and V), twice that backward (K and V again, dK and dV back); buffers for
    distant K and V. Weights are replicated over cp: their gradients are reduced over dp·cp.
Assumes: causal work is balanced by zig-zag chunks (sequence divisible by 2·cp); ring steps overlap with attention step by step.
Source: Liu et al. 2023 (arXiv:2310.01889); zig-zag balance, Brandon et al. 2023 (arXiv:2311.09431); all-gather form, Llama 3
    (arXiv:2407.21783) §3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.context.exchange import (
    gather_keys,
    pass_keys,
    sequence_checks,
    shard_sequence,
)


def valid(ctx: Context) -> Iterable[Check]:
    """Two zig-zag chunks per rank where masks are causal."""
    attentions = [block.attention for block in ctx.model.blocks.values() if block.attention]
    chunks = 2 if any(attention.causal for attention in attentions) else 1
    yield from sequence_checks(ctx, chunks * ctx.mesh.cp)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the sequence; keys and values travel or are gathered."""
    exchange = pass_keys if ctx.knobs["context"] == "p2p" else gather_keys
    return exchange(
        shard_sequence(ledger, ctx, "ring_attention"),
        ctx,
        ctx.mesh.cp,
        ctx.mesh.group("cp"),
        "ring_attention",
    )


def _hiding_block(subject: Pass) -> float:
    """Tokens per rank at which a ring step's attention takes as long as its message: 312 TFLOP/s, 300 GB/s, full mask."""
    case: dict[str, Any] = {
        "model": "bert-large",
        "seq": 8192,
        "cp": 4,
        "attention_kernel": "flash",
        "context": "p2p",
    }
    ledger, _ = figures.run("context", subject, **case)
    attention_s = figures.flop(ledger, "forward", where=lambda item: "core_attn" in item.tags) / 4 / 312e12
    sent = figures.sent_elements(ledger, lambda item: item.phase == "forward" and "cp" in item.tags)
    return 8192 / 4 * (2.0 * sent / 3 / 300e9) / attention_s


TECHNIQUE = Technique(
    key="ring_attention",
    name="Context parallelism (ring attention, all-gather)",
    slot="context",
    choices=("p2p", "all_gather"),
    default=True,
    source="arXiv:2310.01889",
    summary="The sequence split over ranks; keys and values travel beside attention, or are gathered before it",
    knobs=(
        Knob("cp", "context-parallel degree"),
        Knob(
            "context",
            "how queries meet distant keys",
            ("p2p", "all_gather", "a2a", "a2a+p2p", "helped", "tokens", "gathered_ring"),
            "p2p",
        ),
    ),
    figures=(
        Figure(
            "tokens per block that hide the ring, F = 312 TFLOP/s, B = 300 GB/s: F/B",
            1040.0,
            1e-6,
            "Liu et al. 2023 (arXiv:2310.01889), section 3: block size c ≥ F/B",
            _hiding_block,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: True if ctx.knobs["context"] == "p2p" else ctx.mesh.cp > 1,
)
