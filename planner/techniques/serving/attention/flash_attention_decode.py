"""Fused attention over a paged cache: prompts in tiles of queries, generation with split walks over the keys.

What it does: replaces scores, softmax and weighted sum by one kernel for prompt tokens and one for generating sequences,
    which read keys and values from the cache; recurrent mixers update one state per sequence.
Saves: the score matrix, and its masked half.
Costs: every generating sequence reads all of its keys and values; a recurrent one reads and writes its state; latents are
    projected up for all tokens that attention sees (the latent slot says how generation avoids that).
Assumes: paging costs no time; a batch's mean context stands for its sequences' own.
Source: Dao et al. 2022 (arXiv:2205.14135); Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (vLLM, arXiv:2309.06180).
"""

from __future__ import annotations

from typing import Any

from planner.ledger import AttentionCore, Item, Ledger, Matmul, Stream, times
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass

_STATE_BYTES = 8.0  # fp32, read and written


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Swaps the eager core for two fused kernels per block, and adds the states' traffic."""
    stored = str(ctx.knobs["cache"])
    added: list[Item] = []
    for scores in ledger.of(Matmul, phase="forward"):
        if not scores.what.endswith(".scores") or "core_attn" not in scores.tags:
            continue
        block = scores.block
        latent = f"kv_rank@{block}" in ledger.axes
        _, heads = scores.groups.split("*")
        common: dict[str, Any] = {
            "block": block, "tags": frozenset({"core_attn"}), "by": "flash_attention_decode", "source": "arXiv:2205.14135",
            "dtype": ctx.format.activation, "heads": heads, "kv_heads": heads if latent else f"kv_heads@{block}",
            "qk_dim": scores.k, "v_dim": f"v_dim@{block}" if f"v_dim@{block}" in ledger.axes else scores.k, "stored": stored,
        }  # fmt: skip
        added.append(
            AttentionCore(
                what="attention.prefill", batch="1", q="prefill_tokens", kv=f"prefill_keys@{block}",
                visible=f"prefill_visible@{block}", **common,
            )
        )  # fmt: skip
        added.append(
            AttentionCore(
                what="attention.decode",
                batch="decodes",
                q="step_tokens",
                kv=f"decode_keys@{block}",
                decode=True,
                **common,
            )
        )
    added += [
        Stream(
            what="ssm.state_update", block=scan.block, tags=frozenset({"ssm"}), by="flash_attention_decode",
            size=f"decodes*ssm_inner@{scan.block}*ssm_state@{scan.block}", bytes_per_element=_STATE_BYTES, launches=0.0,
        )
        for scan in ledger.of(Stream, what="ssm.scan", phase="forward")
    ]  # fmt: skip
    ledger = ledger.edit(Matmul, lambda item: _all_keys(item, ledger))
    return ledger.drop(lambda item: "core_attn" in item.tags).add(added)


def _all_keys(item: Matmul, ledger: Ledger) -> Item | None:
    """A latent's up-projection, over the tokens that generation sees as well."""
    if item.what != "attention.kv_up" or f"kv_rank@{item.block}" not in ledger.axes:
        return None
    return item.but(m=f"prefill_tokens + {times(f'decode_keys@{item.block}', 'decodes')}")


def _read_bytes(subject: Pass) -> float:
    """Bytes of keys and values that one sequence of Llama-3.1 8B reads per token of context when it generates."""
    return runs.read_bytes_per_token("attention", subject, "llama3.1-8b")


TECHNIQUE = Technique(
    key="flash_attention_decode",
    name="FlashAttention / Flash-Decoding / paged kernels",
    slot="attention",
    job="serving",
    choices=("paged",),
    default=True,
    source="arXiv:2205.14135; Flash-Decoding, 2023",
    summary="One fused kernel for prompts, one for generation, over a paged cache",
    knobs=(Knob("attention", "kernels of attention"),),
    figures=(
        Figure(
            "bytes of the cache that Llama-3.1 8B reads per token of context and step: 2 * 32 * 8 * 128 * 2",
            131072.0,
            1e-9,
            "Kwon et al. 2023 (arXiv:2309.06180), section 3: 2 * layers * hidden of keys * bytes, for grouped queries",
            _read_bytes,
        ),
    ),
    apply=apply,
)
