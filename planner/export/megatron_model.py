"""A model as Megatron-LM's architecture flags, and back.

Megatron-LM describes one kind of layer by global flags; only the choice of dense or expert network and of full or windowed
attention may change from layer to layer. What that cannot say is named by :func:`inexpressible`. Flags are those of
Megatron-LM 0.19 (megatron-core 0.19.2, ``megatron/training/arguments.py``).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from planner.export.flags import FlagReader, Flags
from planner.specs.layers import arrange
from planner.specs.model import Attention, Block, Mlp, Model, Moe

__all__ = ["inexpressible", "model_flags", "model_from_flags"]

_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
_DROPOUT = 0.1  # Megatron-LM's default probability; the planner only knows whether dropout is active
# gpt-oss, whose configuration says swiglu_limit = 7 (openai/gpt-oss, gpt_oss/torch/model.py)
_LIMITED: Flags = {"--quick-geglu": [], "--glu-linear-offset": [1.0], "--activation-func-clamp-value": [7.0]}


def inexpressible(model: Model) -> Iterator[str]:
    """What about a model no Megatron-LM flag says, one phrase each; nothing for a model that it can train."""
    blocks = list(model.blocks.values())
    if model.arch != "decoder":
        yield f"{model.arch} models"
    if not model.head or model.head_bias:
        yield "a model without output projection, or with a bias in it"
    if model.extra_embedding_parameters:
        yield "parameters beside the embedding (norms, token types, front ends)"
    if any(block.ssm for block in blocks):
        yield "state-space layers"
    if any(block.cross_attention for block in blocks):
        yield "cross-attention"
    if any(block.attention is None or (block.mlp is None) == (block.moe is None) for block in blocks):
        yield "layers that are not attention followed by one network"
        return
    yield from _unlike_layers(blocks)
    yield from _unsaid(blocks, model)


def model_flags(model: Model, seq_len: int) -> Flags:
    """Architecture flags of a model that :func:`inexpressible` has nothing against.

    Args:
        model: the model.
        seq_len: tokens per sequence; the position table must hold them.
    """
    order = [model.blocks[name] for name, repeat in model.layers for _ in range(repeat)]
    mlp = next((block.mlp for block in order if block.mlp), None)
    moe = next((block.moe for block in order if block.moe), None)
    attention = order[0].attention
    assert attention is not None
    gated = mlp.gated if mlp else moe is not None and moe.gated
    ffn = mlp.ffn if mlp else moe.expert_ffn if moe else 0
    flags: Flags = {"--num-layers": [len(order)], "--hidden-size": [model.hidden], "--ffn-hidden-size": [ffn]}
    flags |= _attention_flags(attention, order)
    positions = model.learned_positions or model.max_seq_len
    flags["--seq-length"] = [seq_len]
    flags["--max-position-embeddings"] = [max(positions, seq_len)]
    flags["--position-embedding-type"] = ["learned_absolute" if model.learned_positions else "rope"]
    flags["--vocab-size"] = [model.vocab]
    flags["--normalization"] = [_NORMS[order[0].norm]]
    if gated:
        flags |= _LIMITED if moe and moe.limited else {"--swiglu": []}
    if not _biased(order[0]):
        flags["--disable-bias-linear"] = []
        if attention.qkv_bias:
            flags["--add-qkv-bias"] = []
    if not model.tied_embeddings:
        flags["--untie-embeddings-and-output-weights"] = []
    if model.mtp_modules:
        flags["--mtp-num-layers"] = [model.mtp_modules]
    dropout = _DROPOUT if model.dropout else 0.0
    flags |= {"--attention-dropout": [dropout], "--hidden-dropout": [dropout]}
    return flags | (_expert_flags(moe, order) if moe else {})


def model_from_flags(flags: FlagReader, name: str) -> Model:
    """The model that architecture flags describe; what is wrong or missing is noted in ``flags``."""
    layers, hidden = flags.integer("--num-layers"), flags.integer("--hidden-size")
    norm = flags.choice("--normalization", "LayerNorm", {value: key for key, value in _NORMS.items()})
    biased, gated = (
        not flags.present("--disable-bias-linear"),
        flags.present("--swiglu") or flags.present("--quick-geglu"),
    )
    attention = _attention(flags, hidden, biased)
    ffn = flags.integer("--ffn-hidden-size", int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    mlp = Mlp(ffn, gated, biased)
    moe = _moe(flags, ffn, gated, biased)
    window = _window(flags)
    windowed = _pattern(
        flags, "--window-attn-skip-freq", layers, lambda n, i: (i + 1) % n != 0, 1 if window else 0
    )
    expert = _pattern(flags, "--moe-layer-freq", layers, lambda n, i: i % n == 0, 1)
    order = [
        Block(
            attention=replace(attention, window=window if windowed[i] else None),
            mlp=None if moe and expert[i] else mlp,
            moe=moe if expert[i] else None,
            norm=norm,
        )
        for i in range(layers)
    ]
    positions = flags.integer("--max-position-embeddings", flags.integer("--seq-length"))
    learned = flags.text("--position-embedding-type", "learned_absolute") == "learned_absolute"
    learned = learned and not flags.present("--use-rotary-position-embeddings")
    plan = arrange(order)
    return Model(
        name=name, family="megatron", arch="decoder", hidden=hidden, vocab=_vocabulary(flags), max_seq_len=positions,
        blocks=plan.blocks, layers=plan.layers, tied_embeddings=not flags.present("--untie-embeddings-and-output-weights"),
        learned_positions=positions if learned else 0, final_norm=norm, mtp_modules=flags.integer("--mtp-num-layers", 0),
        dropout=max(flags.number("--hidden-dropout", _DROPOUT), flags.number("--attention-dropout", _DROPOUT)) > 0,
        source=f"Megatron-LM flags of {flags.where}",
    )  # fmt: skip


# -- model → flags -----------------------------------------------------------------------------------------------------


def _unlike_layers(blocks: Sequence[Block]) -> Iterator[str]:
    """Differences between layers that global flags cannot describe."""
    if len({replace(b.attention, window=None) for b in blocks if b.attention}) > 1:
        yield "layers whose attention differs in more than its window"
    if len({b.attention.window for b in blocks if b.attention and b.attention.window}) > 1:
        yield "windows of different sizes"
    if len({b.mlp for b in blocks if b.mlp}) > 1 or len({b.moe for b in blocks if b.moe}) > 1:
        yield "feed-forward networks of different sizes"
    if len({part.gated for b in blocks for part in (b.mlp, b.moe) if part}) > 1:
        yield "gated beside plain feed-forward networks"
    if len({_biased(b) for b in blocks}) > 1 or len({b.norm for b in blocks}) > 1:
        yield "layers with different norms or biases"


def _unsaid(blocks: Sequence[Block], model: Model) -> Iterator[str]:
    """Parts of a layer that have no flag."""
    for block in blocks:
        attention = block.attention
        assert attention is not None
        if block.norm not in _NORMS or model.final_norm != block.norm:
            yield f"norms: {block.norm} in layers, {model.final_norm} at the end"
        if block.norms != 2:
            yield f"{block.norms} norms per layer"
        if block.parallel:
            yield "attention beside the feed-forward network"
        if block.extra_parameters:
            yield "weights outside attention and feed-forward network"
        if not attention.causal or attention.cross or attention.relative_projection:
            yield "attention that is not causal self-attention"
        if attention.qk_norm_full:
            yield "query-key norms over all heads at once"
        if attention.index_heads:
            yield "sparse attention with an indexer"
        if not attention.latent and attention.value_dim != attention.head_dim:
            yield "values of another width than keys"
        yield from _unsaid_biases(block, attention)


def _unsaid_biases(block: Block, attention: Attention) -> Iterator[str]:
    """Megatron-LM has one flag for all linear biases, and one for those of queries, keys and values."""
    biased = _biased(block)
    network = block.mlp.bias if block.mlp else block.moe is not None and block.moe.bias
    if (
        not attention.out_bias == network == biased
        or (biased and not attention.qkv_bias)
        or not attention.key_bias
    ):
        yield "biases in some linear layers but not in others"
    if block.moe and block.moe.router_bias != biased:
        yield "a router with a bias beside layers without, or the reverse"


def _biased(block: Block) -> bool:
    network = block.mlp.bias if block.mlp else block.moe is not None and block.moe.bias
    return network or (block.attention is not None and block.attention.out_bias)


def _attention_flags(attention: Attention, order: Sequence[Block]) -> Flags:
    flags: Flags = {"--num-attention-heads": [attention.heads]}
    if attention.latent:
        assert attention.kv_lora_rank is not None
        flags |= {"--multi-latent-attention": [], "--kv-lora-rank": [attention.kv_lora_rank]}
        if attention.q_lora_rank:
            flags["--q-lora-rank"] = [attention.q_lora_rank]
        flags |= {
            "--qk-head-dim": [attention.qk_nope_head_dim],
            "--qk-pos-emb-head-dim": [attention.qk_rope_head_dim],
            "--v-head-dim": [attention.value_dim],
        }
    elif attention.kv_heads != attention.heads:
        flags |= {"--group-query-attention": [], "--num-query-groups": [attention.kv_heads]}
    flags["--kv-channels"] = [attention.value_dim]
    if attention.qk_norm or attention.latent:  # the norms of MLA's two latents hang on the same flag
        flags["--qk-layernorm"] = []
    if attention.sinks:
        flags["--softmax-type"] = ["learnable"]
    if attention.output_gate:
        flags["--attention-output-gate"] = []
    windows = [block.attention.window if block.attention else None for block in order]
    size = next((window for window in windows if window), None)
    if size:
        flags["--window-size"] = [f"{size - 1},0"]  # tokens before and after a query, itself left out
        if not all(windows):
            flags["--window-attn-skip-freq"] = [_runs([int(window is not None) for window in windows])]
    return flags


def _expert_flags(moe: Moe, order: Sequence[Block]) -> Flags:
    flags: Flags = {
        "--num-experts": [moe.experts],
        "--moe-router-topk": [moe.top_k],
        "--moe-ffn-hidden-size": [moe.expert_ffn],
    }
    if moe.top_k == 1:
        flags["--moe-router-pre-softmax"] = []  # the softmax of one value has no gradient
    if moe.shared_ffn:
        flags["--moe-shared-expert-intermediate-size"] = [moe.shared_ffn]
    if moe.shared_gate:
        flags["--moe-shared-expert-gate"] = []
    if moe.latent:
        flags["--moe-latent-size"] = [moe.latent]
    experts = [int(block.moe is not None) for block in order]
    if not all(experts):
        flags["--moe-layer-freq"] = [_runs(experts)]
    return flags


def _runs(pattern: Sequence[int]) -> str:
    """A list of zeros and ones as the Python expression that Megatron-LM evaluates.

    >>> _runs([0, 1, 1, 1])
    '([0]*1+[1]*3)'
    """
    return "(" + "+".join(f"[{value}]*{len(list(run))}" for value, run in groupby(pattern)) + ")"


# -- flags → model -----------------------------------------------------------------------------------------------------


_LATENT: Mapping[str, int | None] = {"q_lora_rank": None, "kv_lora_rank": 32, "v_head_dim": 128}
"""Megatron-LM's defaults of multi-latent attention."""


def _attention(flags: FlagReader, hidden: int, biased: bool) -> Attention:
    heads = flags.integer("--num-attention-heads")
    width = flags.integer("--kv-channels", max(hidden // heads, 1))
    common = {
        "qkv_bias": biased or flags.present("--add-qkv-bias"),
        "out_bias": biased,
        "sinks": flags.text("--softmax-type", "vanilla") == "learnable",
        "output_gate": flags.present("--attention-output-gate"),
    }
    normed = flags.present("--qk-layernorm")
    if flags.present("--multi-latent-attention"):
        nope, rope = flags.integer("--qk-head-dim", 128), flags.integer("--qk-pos-emb-head-dim", 64)
        ranks = {
            name: flags.integer(f"--{name.replace('_', '-')}", default) for name, default in _LATENT.items()
        }
        return Attention(
            heads, heads, nope + rope, qk_nope_head_dim=nope, qk_rope_head_dim=rope, **ranks, **common
        )
    grouped = flags.present("--group-query-attention")
    groups = flags.integer("--num-query-groups", 1)
    return Attention(heads, groups if grouped else heads, width, qk_norm=normed, **common)


def _moe(flags: FlagReader, ffn: int, gated: bool, biased: bool) -> Moe | None:
    experts = flags.integer("--num-experts", None)
    top_k = flags.integer("--moe-router-topk", 2)
    width = flags.integer("--moe-ffn-hidden-size", ffn)
    shared, latent = (
        flags.integer("--moe-shared-expert-intermediate-size", 0),
        flags.integer("--moe-latent-size", 0),
    )
    gate = flags.present("--moe-shared-expert-gate")
    if not experts:
        return None
    limited = flags.number("--activation-func-clamp-value", 0.0) > 0.0
    return Moe(
        experts, top_k, width, shared, gated, biased, gate, router_bias=biased, limited=limited, latent=latent
    )


def _window(flags: FlagReader) -> int | None:
    text = flags.text("--window-size", None)
    if text is None:
        return None
    sides = text.strip("() ").split(",")
    if len(sides) != 2 or not all(side.strip().lstrip("-").isdigit() for side in sides):
        flags.fault("--window-size", repr(text), "two numbers, such as 4095,0")
        return None
    return int(sides[0]) + 1 if int(sides[0]) >= 0 else None


def _pattern(
    flags: FlagReader, flag: str, layers: int, every: Callable[[int, int], bool], default: int
) -> list[int]:
    """One number per layer: a list expression, or a frequency that ``every(n, layer)`` reads."""
    text = flags.text(flag, None)
    if text is None:
        return [default] * layers
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        value = None
    if isinstance(value, int) and value > 0:
        return [int(every(value, layer)) for layer in range(layers)]
    if isinstance(value, list) and len(value) == layers:
        return value
    flags.fault(flag, repr(text), f"a positive number, or a list of {layers} zeros and ones")
    return [default] * layers


def _evaluate(node: ast.expr) -> int | list[int]:
    """Numbers, lists, ``+`` and ``*``; nothing else is evaluated.

    Raises:
        ValueError: the expression holds something else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        items = [_evaluate(item) for item in node.elts]
        if all(isinstance(item, int) for item in items):
            return items  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if (
            isinstance(node.op, ast.Mult)
            and isinstance(left, list)
            and isinstance(right, int)
            and right <= 10_000
        ):
            return left * right
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
    raise ValueError("not a list of numbers")


_TOKENIZERS: Mapping[str, int] = {
    "GPT2BPETokenizer": 50257,  # Radford et al. 2019, the vocabulary of GPT-2
    "Llama2Tokenizer": 32000,  # arXiv:2307.09288 §2.2
}


def _vocabulary(flags: FlagReader) -> int:
    """Entries of the vocabulary; unpadded, because pricing pads as Megatron-LM does."""
    tokenizer = flags.text("--tokenizer-type", "GPT2BPETokenizer")  # the default of pretrain_gpt.py
    size = flags.integer("--vocab-size", flags.integer("--padded-vocab-size", _TOKENIZERS.get(tokenizer)))
    if size is None:
        flags.fault("--vocab-size", "is missing, and the tokenizer does not tell", "the vocabulary's size")
        return 1
    return int(size)
