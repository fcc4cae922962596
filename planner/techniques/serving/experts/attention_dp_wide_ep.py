"""Attention ranks with requests of their own, and experts spread over all of them: tokens travel to their experts.

What it does: every rank sends each of its tokens to the ranks that hold the token's experts, and gets the weighted results back;
    whole experts lie on every rank.
Saves: what a gather of all tokens moves: a rank's traffic no longer grows with the number of ranks.
Costs: two all-to-alls per layer, of up to k copies of a token; 8-bit ones on the way out where the weights are narrow.
Assumes: a token goes to a rank once, however many of its experts lie there; ranks send and receive evenly but for the busiest.
Source: DeepSeek-V3 (arXiv:2412.19437) §3.4; deepseek-ai/DeepEP; SGLang ``--moe-a2a-backend deepep``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.costs.moe import distinct_domains
from planner.ledger import Collective, Item, Ledger
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.experts.spread import mixtures, spread, whole_experts
from planner.techniques.serving.runs import Pass

_NARROW = ("fp8", "fp8_block", "nvfp4")


def valid(ctx: ServingContext) -> Iterable[Check]:
    """There is somewhere to send tokens to."""
    yield from whole_experts(ctx)
    yield Check("an exchange of tokens without attention ranks", ctx.mesh.cp * ctx.mesh.dp > 1)
    yield Check("an exchange of tokens to experts that are cut", ctx.mesh.etp == 1)


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Cuts experts and adds both exchanges."""
    blocks = mixtures(ctx)
    if not blocks:
        return ledger
    mesh = ctx.mesh
    ledger = spread(ledger, ctx, "attention_dp_wide_ep")
    copies = {
        f"copies@{block}": np.asarray(distinct_domains(float(moe.top_k), mesh.ep) / mesh.tp)
        for block in blocks
        if (moe := ctx.model.blocks[block].moe) is not None
    }
    ledger = ledger.set_axes(**copies)
    added: list[Item] = []
    for block in blocks:
        for what, dtype in (
            ("moe.dispatch", "fp8" if str(ctx.knobs["weights"]) in _NARROW else ctx.format.activation),
            ("moe.combine", ctx.format.activation),
        ):
            added.append(
                Collective(
                    what=what, block=block, tags=frozenset({"experts"}), by="attention_dp_wide_ep", source="arXiv:2412.19437",
                    kind="all_to_all", group=mesh.group("ep"), size=f"batch*residual_seq*hidden*copies@{block}", dtype=dtype,
                )
            )  # fmt: skip
    return ledger.add(added)


def _copies(subject: Pass) -> float:
    """Ranks that a token of DeepSeek-V3 is sent to, of 8 that hold all experts."""
    ledger = runs.run("experts", subject, model="deepseek-v3", dp=8, ep=8, decodes=8.0)
    found = next((item for item in ledger.of(Collective, what="moe.dispatch")), None)
    return 0.0 if found is None else float(np.ravel(ledger.axes[found.size])[0]) / 7168


TECHNIQUE = Technique(
    key="attention_dp_wide_ep",
    name="Attention data parallel + wide EP (DeepSeek, SGLang, vLLM)",
    slot="experts",
    job="serving",
    choices=("exchanged",),
    source="arXiv:2412.19437",
    summary="Tokens travel to experts that are spread over all attention ranks",
    knobs=(
        Knob("dp", "attention ranks of a replica"),
        Knob("experts", "how tokens reach experts", ("gathered", "exchanged")),
    ),
    figures=(
        Figure(
            "ranks that a token with 8 of 256 experts is sent to, of 8: 8 (1 - (1 - 1/8)^8)",
            5.251,
            1e-3,
            "deepseek-ai/DeepEP, README: a token is sent to a rank once; by counting",
            _copies,
        ),
    ),
    valid=valid,
    apply=apply,
)
