"""Fused memory-bound kernels of serving engines: residual additions inside norms, routing inside the experts' call.

What it does: the addition to the residual stream joins the norm behind it; copies of tokens to experts and back, and the
    experts' activation, are part of the call that the engine's library makes for experts.
Saves: one launch and one pass over the residual stream per branch, and the launches of an expert layer's small kernels.
Costs: nothing.
Assumes: the last addition joins the final norm.
Source: vLLM ``fused_add_rms_norm``, ``fused_moe``; Fang et al. 2021 (TurboTransformers, arXiv:2010.05680) §4.
"""

from __future__ import annotations

from planner.ledger import Item, Ledger, Stream
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_ROUTED = ("moe.permute", "moe.unpermute", "moe.act")


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Drops additions, widens the norms that take them, and leaves experts one launch per product."""

    def fused(item: Stream) -> Item | None:
        if item.what in _ROUTED:
            return item.but(launches=0.0, by="fused_kernels")
        if (
            "norm" in item.tags
            and item.what.startswith(("norm", "final_norm"))
            and not item.what.endswith("_post")
        ):
            return item.but(bytes_per_element=2.0 * item.bytes_per_element, by="fused_kernels")
        return None

    return ledger.drop(lambda item: "add" in item.tags and isinstance(item, Stream)).edit(Stream, fused)


def _streams(subject: Pass) -> float:
    """Memory-bound kernels of a layer of Llama-3.1 8B."""
    ledger = runs.run("fusion", subject, model="llama3.1-8b")
    return sum(item.launches for item in ledger.of(Stream) if item.block not in ("embedding", "head"))


TECHNIQUE = Technique(
    key="fused_kernels",
    name="Coarse fusion: LightSeq, EET, FasterTransformer, DeepSpeed kernels",
    slot="fusion",
    job="serving",
    choices=("fused",),
    default=True,
    source="NAACL 2021; arXiv:2104.12470",
    summary="Additions join norms; routing joins the experts' call",
    knobs=(Knob("fusion", "fusion of memory-bound kernels", ("fused",)),),
    figures=(
        Figure(
            "memory-bound kernels of a Llama layer: two norms with addition, rotation, activation",
            4.0,
            1e-9,
            "vLLM vllm/model_executor/models/llama.py: input_layernorm, rotary_emb, post_attention_layernorm, act_fn",
            _streams,
        ),
    ),
    apply=apply,
)
