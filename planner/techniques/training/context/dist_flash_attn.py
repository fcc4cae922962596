"""DistFlashAttention: contiguous parts of a causal sequence, where ranks that are done early help those that are not.

What it does: shards the sequence into cp neighbouring parts; a rank needs keys and values of the parts before its own only, and
    ranks of the first parts take over attention of the last ones.
Saves: activations and token-wise work, divided by cp; half of the ring's traffic, as half of all pairs of parts are masked.
Costs: b·s·h_kv·(cp − 1)/cp elements forward, twice that backward; for even cp, a step more than an even share of the work.
Assumes: what helpers receive and return is neglected, as in the paper's count; steps overlap with their messages.
Source: Li et al. 2024 (DistFlashAttn, LightSeq, arXiv:2310.03294) §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from planner.ledger import Ledger
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.context.exchange import pass_keys, sequence_checks, shard_sequence

_KEY = "dist_flash_attn"


def valid(ctx: Context) -> Iterable[Check]:
    """A causal mask that leaves half of the pairs of parts, whole parts."""
    yield from sequence_checks(ctx, ctx.mesh.cp)
    attentions = [
        a for block in ctx.model.blocks.values() for a in (block.attention, block.cross_attention) if a
    ]
    causal = all(a.causal and not a.cross and not a.window for a in attentions)
    yield Check("helpers balance a causal mask over whole sequences", (ctx.mesh.cp == 1) | causal)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the sequence; half of the distant keys and values travel."""
    cp = ctx.mesh.cp
    distant = np.maximum(cp - 1.0, 1.0)
    ledger = ledger.set_axes(causal_pairs=0.5, helped=2.0 * np.ceil(distant / 2.0) / distant)
    sharded = shard_sequence(ledger, ctx, _KEY)
    return pass_keys(sharded, ctx, cp, ctx.mesh.group("cp"), _KEY, "causal_pairs", "helped")


def _less(subject: Pass) -> float:
    """Elements of a layer of Megatron's sequence parallelism with full recomputation, over these."""
    case: dict[str, Any] = {
        "model": "llama-7b", "seq": 65536, "cp": 8, "attention_kernel": "flash", "context": "helped",
    }  # fmt: skip
    ledger, ctx = figures.run("context", subject, **case)
    # 2 gathers and 2 scatters forward, again in the recomputation, and backward, where inputs are gathered once more.
    megatron = (4 + 4 + 6) * 7 / 8 * 65536 * ctx.model.hidden
    sent = figures.sent_elements(ledger, lambda i: "cp" in i.tags)
    return megatron / sent if sent else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="DistFlashAttention (helpers under a causal mask)",
    slot="context",
    choices=("helped",),
    searched=False,  # half of the ring's bytes, which attention on long sequences hides anyway
    source="arXiv:2310.03294",
    summary="Contiguous parts of a causal sequence; early ranks help late ones",
    figures=(
        Figure(
            "times less communication than Megatron-LM with sequence parallelism",
            4.7,
            0.01,  # 14/3
            "Li et al. 2024 (arXiv:2310.03294), abstract of version 1 and section 3: up to 4.7x",
            _less,
        ),
    ),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.cp > 1,
)
