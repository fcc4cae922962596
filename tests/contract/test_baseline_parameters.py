"""The baseline ledger holds and multiplies every weight that the closed-form counts know, for every shipped model.

Oracle: ``planner.specs.parameters``, which is checked against published sizes and shares no code with the ledger.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from planner.ledger import AttentionCore, Ledger, Matmul, Resident
from planner.operators.baseline import EMBEDDING, HEAD, baseline
from planner.operators.graph import ENCODER
from planner.specs.formats import FORMATS
from planner.specs.model import Attention, Block, Mlp, Model, Moe, Ssm
from planner.specs.models import list_models, load_model
from planner.specs.parameters import (
    attention_parameters,
    block_parameters,
    embedding_parameters,
    head_parameters,
    mlp_parameters,
    moe_parameters,
    ssm_parameters,
)
from planner.technique import discover

SEQ = 64.0
BETWEEN_ACTIVATIONS = (".scores", ".context", ".index_scores", ".relative_product")


def kinds(model: Model) -> dict[str, str]:
    """Names of blocks by the name of their items."""
    encoder = {ENCODER + name: name for name, _ in model.encoder_layers}
    return encoder | {name: name for name, _ in model.layers}


def held(ledger: Ledger, pool: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for item in ledger.of(Resident, pool=pool):
        found[item.block] += int(ledger.axes[item.size])
    return found


@pytest.mark.parametrize("name", list_models())
def test_every_weight_is_held_where_it_is_used(name: str) -> None:
    model = load_model(name)
    expected = Counter({kind: block_parameters(model, block) for kind, block in kinds(model).items()})
    expected.update({EMBEDDING: embedding_parameters(model), HEAD: head_parameters(model)})
    ledger = baseline(model, batch=1.0, seq=SEQ)
    assert held(ledger, "parameters") == expected
    assert held(ledger, "gradients") == expected


@pytest.mark.parametrize("name", list_models())
def test_every_matrix_multiplies_every_token_once(name: str) -> None:
    # One sequence, as long on the encoder's side: multiply-adds = tokens x elements of the matrices that a token uses.
    model = load_model(name)
    ledger = baseline(model, batch=1.0, seq=SEQ)
    products: Counter[str] = Counter()
    for item in ledger.of(Matmul, phase="forward"):
        if not item.what.endswith(BETWEEN_ACTIVATIONS):
            products[item.block] += round(
                float(np.prod([ledger.axes[e] for e in (item.m, item.n, item.k, item.groups)]))
            )
    expected = {
        kind: int(SEQ) * matrix_elements(model.blocks[b], model.hidden) for kind, b in kinds(model).items()
    }
    if model.head and model.vocab:
        expected[HEAD] = int(SEQ) * model.vocab * model.hidden
    assert products == expected


def matrix_elements(block: Block, hidden: int) -> int:
    """Elements of the matrices that one token passes through: parameters without norms, biases and other vectors."""
    total = 0
    for attention in (block.attention, block.cross_attention):
        if attention is not None:
            bare = replace(attention, qkv_bias=False, out_bias=False, qk_norm=False, sinks=False)
            norms = (
                (attention.kv_lora_rank or 0) + (attention.q_lora_rank or 0) + 2 * attention.index_head_dim
            )
            total += attention_parameters(bare, hidden) - norms
    if block.mlp is not None:
        total += mlp_parameters(replace(block.mlp, bias=False), hidden)
    if block.moe is not None:
        bare_moe = replace(block.moe, bias=False, router_bias=False)
        total += moe_parameters(bare_moe, hidden, active=True)
    if block.ssm is not None:
        total += state_space_matrix_elements(block.ssm, hidden)
    return total


def state_space_matrix_elements(ssm: Ssm, hidden: int) -> int:
    bare = replace(ssm, bias=False, conv_bias=False, gated_norm=False, inner_norms=False)
    if ssm.version == 1:
        convolved = ssm.inner
        vectors = ssm.inner + ssm.inner * ssm.state_size + ssm.inner  # the step's bias, A, D
    else:
        convolved = ssm.inner + 2 * ssm.groups * ssm.state_size
        vectors = ssm.heads * (2 if ssm.delta else 3)  # A, the step's bias, D
    return ssm_parameters(bare, hidden) - vectors - convolved * ssm.conv_kernel


def tiny(**parts: object) -> Model:
    return Model(
        name="tiny", family="tiny", arch="decoder", hidden=32, vocab=100, max_seq_len=64,
        blocks={"block": Block(**parts)}, layers=(("block", 1),),
    )  # fmt: skip


MHA = Attention(heads=4, kv_heads=2, head_dim=8)
MLA = Attention(4, 4, 8, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
MAMBA2 = Ssm(2, 64, 16, heads=8, groups=2)
RARE = {
    "attention beside state space": {"attention": MHA, "ssm": MAMBA2, "mlp": Mlp(64)},
    "values narrower than keys": {"attention": replace(MHA, v_head_dim=6, qkv_bias=True, output_gate=True)},
    "no key bias": {"attention": replace(MHA, qkv_bias=True, out_bias=True, key_bias=False, qk_norm=True)},
    "latent attention with biases": {"attention": replace(MLA, q_lora_rank=12, qkv_bias=True, out_bias=True)},
    "latent attention with norms": {"attention": replace(MLA, qk_norm=True)},
    "latent attention with full norms": {"attention": replace(MLA, qk_norm=True, qk_norm_full=True)},
    "indexer without latent": {"attention": replace(MHA, index_heads=2, index_head_dim=4, index_top_k=8)},
    "mamba with biases": {"ssm": Ssm(1, 64, 16, dt_rank=2, bias=True, conv_bias=False), "norms": 1},
    "mamba-2 without norm": {"ssm": replace(MAMBA2, bias=True, gated_norm=False), "norms": 1},
    "dense network beside experts": {"attention": MHA, "mlp": Mlp(64), "moe": Moe(8, 2, 16), "norms": 3},
    "latent experts with biases": {"moe": Moe(8, 2, 16, shared_ffn=24, bias=True, latent=12), "norms": 1},
    "parallel with norms behind": {"attention": MHA, "mlp": Mlp(64), "parallel": True, "norms": 4},
    "no norm": {"attention": MHA, "mlp": Mlp(64), "norms": 0},
    "more norms than places": {"mlp": Mlp(64), "norms": 5, "norm": "layernorm"},
    "extra parameters": {"attention": MHA, "mlp": Mlp(64), "extra_parameters": 77},
}


@pytest.mark.parametrize("name", RARE)
def test_parts_that_no_shipped_model_combines(name: str) -> None:
    model = tiny(**RARE[name])
    ledger = baseline(model, batch=1.0, seq=SEQ)
    assert held(ledger, "parameters")["block"] == block_parameters(model, "block")


def test_sparse_attention_works_on_the_chosen_keys_alone() -> None:
    # Causal, 64 tokens, 8 keys each: (1 + 2 + ... + 8 + 56 x 8) / 64^2 of the score matrix.
    sparse = replace(MHA, index_heads=2, index_head_dim=4, index_top_k=8)
    ledger = baseline(tiny(attention=sparse, norms=1), batch=1.0, seq=SEQ)
    assert ledger.axes["visible@block"] == (36 + 56 * 8) / 64**2
    # The indexer scores every visible key: 65/2 of them on average, with 2 heads of 4.
    (scores,) = ledger.of(Matmul, what="attention.index_scores", phase="forward")
    products = [float(ledger.axes[e]) for e in (scores.m, scores.n, scores.k, scores.groups)]
    assert products == [64, 32.5, 4, 2]
    # A decode step over 64 keys works on 8.
    decode = baseline(tiny(attention=sparse, norms=1), batch=1.0, seq=1.0, kv_seq=64.0, training=False)
    assert decode.axes["visible@block"] == 8 / 64


def test_fused_attention_sees_the_widths_and_heads_of_keys_and_values() -> None:
    # Two KV heads, keys of 8 and values of 6 (no latent attention).
    ledger = baseline(tiny(attention=replace(MHA, v_head_dim=6), norms=1), batch=1.0, seq=SEQ, training=False)
    ctx = SimpleNamespace(format=FORMATS["bf16"])  # all that the fused kernels ask a context for
    fused = discover()["flash_attention"].apply(ledger, ctx)  # type: ignore[arg-type]
    (core,) = fused.of(AttentionCore)
    assert [int(fused.axes[e]) for e in (core.kv_heads, core.qk_dim, core.v_dim)] == [2, 8, 6]


def test_saved_inputs_of_experts_grow_with_the_routed_tokens() -> None:
    # 64 tokens, each to 2 of 8 experts with a gated width of 16: 64 x 2 x 2 x 16 elements, however many experts there are.
    ledger = baseline(tiny(moe=Moe(8, 2, 16), norms=1), batch=1.0, seq=SEQ)
    (kept,) = ledger.of(Resident, what="moe.act_input")
    assert ledger.axes[kept.size] == 64 * 2 * 2 * 16
