"""Attention: projections, rotary embedding, the eager core, output projection; latent, gated, sparse and relative forms.

Sources: Korthikanti et al. 2022 (arXiv:2205.05198) §4.1; multi-head latent attention, DeepSeek-V2 (arXiv:2405.04434) §2.1;
sparse attention's indexer, DeepSeek-V3.2 (arXiv:2512.02556) §2.1; relative positions, Transformer-XL (arXiv:1901.02860)
§3.3; output gate, Qwen3-Next as released.
"""

from __future__ import annotations

from typing import NamedTuple

from planner.ledger import times
from planner.operators.graph import MASK, NORM, NORM_BACKWARD, Graph
from planner.specs.model import Attention

__all__ = ["attention"]

_ROPE = 2.0  # reads and writes queries and keys
_GATE, _GATE_BACKWARD = 3.0, 5.0  # (output, gate) -> gated; (gradient, output, gate) -> both gradients


class _Shape(NamedTuple):
    """The axes of one attention: heads, widths of one head, and expressions for the rows of queries and of keys."""

    region: str
    heads: str
    kv_heads: str
    qk: str
    v: str
    rows: str
    key_rows: str
    keys: str

    @property
    def queries(self) -> str:
        """Elements of the queries."""
        return f"{self.rows}*{self.heads}*{self.qk}"

    @property
    def rotated(self) -> str:
        """Elements of queries and keys."""
        return f"{self.queries} + {self.key_rows}*{self.kv_heads}*{self.qk}"

    @property
    def output(self) -> str:
        """Elements of the core's output."""
        return f"{self.rows}*{self.heads}*{self.v}"


def attention(graph: Graph, spec: Attention, region: str, keeps_input: bool) -> None:
    """Emits an attention; ``region`` is ``attention`` or ``cross``, the first part of its items' names."""
    shape = _shape(graph, spec, region)
    made_in = ("qkv", "mla_up") if spec.latent else ("qkv",)
    if spec.latent:
        _latent_projections(graph, spec, shape)
    else:
        _projections(graph, spec, shape)
    if spec.qk_norm:
        _qk_norm(graph, spec, shape)
        graph.save(f"{region}.qk_norm_input", shape.rotated, *made_in)
    if keeps_input:
        graph.save(f"{region}.qkv_input", graph.residual, "norm", "linear_input")
    if spec.index_heads:
        _indexer(graph, spec, region)
    if not graph.model.learned_positions:
        graph.stream(f"{region}.rope", shape.rotated, _ROPE, _ROPE, tags=set(made_in))
    graph.save(f"{region}.q", shape.queries, *made_in)
    graph.save(f"{region}.k", f"{shape.key_rows}*{shape.kv_heads}*{shape.qk}", *made_in)
    graph.save(f"{region}.v", f"{shape.key_rows}*{shape.kv_heads}*{shape.v}", *made_in)
    if spec.relative_projection:
        _relative_positions(graph, shape)
    _eager_core(graph, shape)
    graph.save(f"{region}.core_output", shape.output, "core_attn", "linear_input")
    if spec.output_gate:
        graph.save(f"{region}.gate", shape.queries, "qkv")
        graph.stream(f"{region}.gate", shape.output, _GATE, _GATE_BACKWARD, tags={"attn_output"})
        graph.save(f"{region}.gated_output", shape.output, "attn_output", "linear_input")
    graph.matmul(f"{region}.output", shape.rows, "hidden", f"{shape.heads}*{shape.v}", {"attn_output", "row"})
    graph.weight(f"hidden*{shape.heads}*{shape.v}")
    if spec.out_bias:
        graph.weight("hidden")
    if spec.sinks:
        graph.weight(shape.heads)
    _cache(graph, spec, shape)


def _shape(graph: Graph, spec: Attention, region: str) -> _Shape:
    part = "cross" if spec.cross else ""
    heads = graph.axis("heads", spec.heads, part)
    kv_heads = graph.axis("kv_heads", spec.kv_heads, part)
    qk = graph.axis("qk_dim" if spec.latent else "head_dim", spec.query_dim, part)
    # One axis where both widths are one number, so that gains of head width are found by its name.
    v = graph.axis("v_dim", spec.value_dim, part) if spec.latent or spec.value_dim != spec.head_dim else qk
    key_rows, keys = ("batch*encoder_seq", "encoder_kv_seq") if spec.cross else (graph.rows, graph.kv_seq)
    return _Shape(region, heads, heads if spec.latent else kv_heads, qk, v, graph.rows, key_rows, keys)


def _projections(graph: Graph, spec: Attention, shape: _Shape) -> None:
    """Queries (twice as wide with an output gate), keys and values: one product, or two where the inputs are two."""
    query = f"{2 if spec.output_gate else 1}*{shape.heads}*{shape.qk}".removeprefix("1*")
    key, value = f"{shape.kv_heads}*{shape.qk}", f"{shape.kv_heads}*{shape.v}"
    if spec.cross:
        products = [("q", shape.rows, query), ("kv", shape.key_rows, f"{key} + {value}")]
    else:
        products = [("qkv", shape.rows, f"{query} + {key} + {value}")]
    for name, rows, width in products:
        graph.matmul(f"{shape.region}.{name}", rows, width, "hidden", {"qkv", "column"})
        graph.weight(times(width, "hidden"))
    if spec.qkv_bias:
        graph.weight(query, value, *([key] if spec.key_bias else []))


def _qk_norm(graph: Graph, spec: Attention, shape: _Shape) -> None:
    """Norms of queries and keys: of each head, or of all heads at once."""
    width = graph.axis("qk_norm_dim", spec.head_dim) if spec.latent else shape.qk
    if spec.qk_norm_full:
        kv_heads = graph.axis("kv_heads", spec.kv_heads, "cross" if spec.cross else "")
        graph.weight(f"{shape.heads}*{width}", f"{kv_heads}*{width}")
    else:
        graph.weight(f"2*{width}")
    tags = {"qkv", "all_heads"} if spec.qk_norm_full else {"qkv"}
    graph.stream(f"{shape.region}.qk_norm", shape.rotated, NORM, NORM_BACKWARD, tags=tags)


def _latent_projections(graph: Graph, spec: Attention, shape: _Shape) -> None:
    """Down- and up-projections of multi-head latent attention; down-projections run on the residual's tokens."""
    region, heads, tokens = shape.region, shape.heads, graph.tokens
    part = "cross" if spec.cross else ""
    rank = spec.kv_lora_rank or 0
    up = graph.axis("kv_up", spec.qk_nope_head_dim + spec.value_dim, part)
    kv_rank = graph.axis("kv_rank", rank, part)
    down = graph.axis("kv_down", rank + spec.qk_rope_head_dim, part)
    up_tags = {"qkv", "column", "mla_up"}
    if spec.q_lora_rank:
        q_rank = graph.axis("q_rank", spec.q_lora_rank, part)
        graph.matmul(f"{region}.q_down", tokens, q_rank, "hidden", {"qkv", "replicated"})
        graph.stream(f"{region}.q_norm", f"{tokens}*{q_rank}", NORM, NORM_BACKWARD, tags={"qkv"})
        graph.matmul(f"{region}.q_up", shape.rows, f"{heads}*{shape.qk}", q_rank, up_tags)
        graph.weight(f"hidden*{q_rank}", q_rank, f"{q_rank}*{heads}*{shape.qk}")
        graph.save(f"{region}.q_latent", f"2*{tokens}*{q_rank}", "qkv")
        if spec.qkv_bias:
            graph.weight(q_rank)
    else:
        graph.matmul(f"{region}.q", shape.rows, f"{heads}*{shape.qk}", "hidden", up_tags)
        graph.weight(f"hidden*{heads}*{shape.qk}")
    graph.matmul(f"{region}.kv_down", tokens, down, "hidden", {"qkv", "replicated"})
    graph.stream(f"{region}.kv_norm", f"{tokens}*{kv_rank}", NORM, NORM_BACKWARD, tags={"qkv"})
    graph.matmul(f"{region}.kv_up", shape.rows, f"{heads}*{up}", kv_rank, up_tags)
    graph.weight(f"hidden*{down}", kv_rank, f"{kv_rank}*{heads}*{up}")
    graph.save(f"{region}.kv_latent", f"2*{tokens}*{kv_rank}", "qkv")
    if spec.qkv_bias:
        graph.weight(down)


def _indexer(graph: Graph, spec: Attention, region: str) -> None:
    """Scores of all visible keys by a few small heads that share one key, and the choice of the best.

    Every tensor rank holds the whole indexer and scores all of its keys for all of its queries, as each needs all choices
    for its own heads (Megatron-LM ``experimental_attention_variant/dsa.py``). It learns from attention's own distribution, on
    inputs cut off from the graph: no gradient leaves it.
    """
    heads, width = (
        graph.axis("index_heads", spec.index_heads),
        graph.axis("index_dim", spec.index_head_dim),
    )
    source = graph.axis("q_rank", spec.q_lora_rank) if spec.q_lora_rank else "hidden"
    keys = f"index_keys@{graph.name}"
    for name, n, k in (
        ("index_q", f"{heads}*{width}", source),
        ("index_k", width, "hidden"),
        ("index_weights", heads, "hidden"),
    ):
        tags = {"qkv", "indexer", "replicated"}
        graph.matmul(f"{region}.{name}", graph.rows, n, k, tags, input_gradient=False)
        graph.weight(f"{k}*{n}")
    graph.weight(f"2*{width}")  # the keys' norm, scale and shift
    graph.stream(f"{region}.index_norm", f"{graph.rows}*{width}", NORM, NORM_BACKWARD, tags={"indexer"})
    graph.save(f"{region}.index_q", f"{graph.rows}*{heads}*{width}", "qkv", "indexer")
    graph.save(f"{region}.index_k", f"{graph.rows}*{width}", "qkv", "indexer")
    graph.matmul(
        f"{region}.index_scores",
        graph.seq,
        keys,
        width,
        {"indexer"},
        f"batch*{heads}",
        weights=False,
    )
    # The product's kernel sums over heads; the choice reads one score per query and key, the loss its gradient.
    graph.stream(f"{region}.index_top_k", f"{graph.rows}*{keys}", 2.0, 2.0, tags={"indexer"})


def _relative_positions(graph: Graph, shape: _Shape) -> None:
    """Keys of all distances, projected from fixed encodings, and each query's product with them."""
    tags = {"qkv", "relative"}
    width = f"{shape.heads}*{shape.qk}"
    graph.matmul(f"{shape.region}.relative", shape.keys, width, "hidden", tags, input_gradient=False)
    graph.weight(f"hidden*{width}")
    groups = f"batch*{shape.heads}"
    graph.matmul(
        f"{shape.region}.relative_product",
        graph.seq,
        shape.keys,
        shape.qk,
        {"relative"},
        groups,
        weights=False,
    )


def _eager_core(graph: Graph, shape: _Shape) -> None:
    """Scores, softmax, dropout and weighted sum as separate kernels that materialise the score matrix."""
    region, groups, tags = shape.region, f"batch*{shape.heads}", {"core_attn"}
    scores = f"{groups}*{graph.seq}*{shape.keys}"
    graph.matmul(f"{region}.scores", graph.seq, shape.keys, shape.qk, tags, groups, weights=False)
    # Scale, mask and softmax: read scores, write probabilities; dropout reads them and writes the masked copy and its mask.
    passes = 4.0 + MASK if graph.model.dropout else 2.0
    graph.stream(f"{region}.softmax", scores, passes, passes + 1.0, tags=tags)
    graph.save(f"{region}.probabilities", scores, "core_attn")
    if graph.model.dropout:
        graph.save(f"{region}.probabilities_mask", scores, "core_attn", mask=True)
        graph.save(f"{region}.probabilities_dropped", scores, "core_attn")
    graph.matmul(f"{region}.context", graph.seq, shape.v, shape.keys, tags, groups, weights=False)


def _cache(graph: Graph, spec: Attention, shape: _Shape) -> None:
    """Keys and values of all tokens seen; the latent and its rotary key under MLA; the indexer's keys."""
    if spec.latent:
        index = spec.index_head_dim if spec.index_heads else 0
        latent = (spec.kv_lora_rank or 0) + spec.qk_rope_head_dim + index
        width = graph.axis("latent", latent, "cross" if spec.cross else "")
    else:
        width = f"{shape.kv_heads}*{shape.qk} + {shape.kv_heads}*{shape.v}"
    graph.cache(f"{shape.region}.kv_cache", times(width, "batch*kv_seq"))
