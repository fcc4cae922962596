"""The ledger of a model before any technique: every operator of every block kind, forward and backward, in fp32.

One block kind at a time, as eager kernels on one device: matrix products, memory-bound kernels, the tensors that the
backward pass needs (named by the recompute region that produces them), and the weights. All sizes are expressions over
named axes, so that passes can shard them. The same operators serve training (with a backward pass) and inference
(``training=False``: forward only, nothing saved, keys and values held in a cache).

Sources: operator list and saved tensors of a GPT block, Korthikanti et al. 2022 (arXiv:2205.05198) §4.1 and Table 2;
multi-head latent attention, DeepSeek-V2 (arXiv:2405.04434) §2.1; Mamba-2, arXiv:2405.21060.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.costs.compute import causal_fraction
from planner.ledger import Array, Axes, Item, Ledger, Matmul, Phase, Resident, Stream
from planner.specs.model import Attention, Block, Mlp, Model, Moe, Ssm

__all__ = ["EMBEDDING", "HEAD", "baseline", "block_order"]

EMBEDDING, HEAD = "embedding", "head"
ENCODER = "encoder."

# Bytes that a memory-bound kernel moves per element, in units of one activation element: reads + writes.
_NORM, _NORM_BACKWARD = 2.0, 3.0  # x -> y; (dy, x) -> dx
_ADD, _ADD_BACKWARD = 3.0, 1.0  # (x, residual) -> sum; the gradient is passed on, and summed once
_ROPE = 2.0


def baseline(
    model: Model,
    *,
    batch: Array | float,
    seq: Array | float,
    kv_seq: Array | float | None = None,
    encoder_seq: Array | float | None = None,
    document_len: float | None = None,
    training: bool = True,
) -> Ledger:
    """The ledger of one micro-batch (or one inference iteration) on one device.

    Args:
        model: the model.
        batch: sequences in the micro-batch, scalar or one per row.
        seq: query tokens per sequence (1 in a decode iteration).
        kv_seq: keys that a query can see, per sequence; None means ``seq``.
        encoder_seq: tokens per sequence on the encoder's side.
        document_len: packed documents that attention does not cross.
        training: with backward items and saved tensors, or forward only with a KV cache.
    """
    kv_seq = seq if kv_seq is None else kv_seq
    sizes: dict[str, Array | float] = {
        "batch": batch,
        "seq": seq,
        "residual_seq": seq,
        "kv_seq": kv_seq,
        "logit_seq": seq if training else 1.0,
        "encoder_seq": seq if encoder_seq is None else encoder_seq,
        "encoder_residual_seq": seq if encoder_seq is None else encoder_seq,
        "encoder_kv_seq": seq if encoder_seq is None else encoder_seq,
        "hidden": float(model.hidden),
        "vocab": float(model.vocab),
        "tied_copy": 0.0,  # a pipeline keeps a second copy of a tied embedding on its last stage
    }
    items: list[Item] = []
    for name, spec, encoder in _kinds(model):
        graph = _Graph(name, model, training, encoder)
        graph.block(spec)
        items += graph.finish()
        sizes.update(graph.sizes)
        if spec.attention is not None:
            sizes[f"visible@{name}"] = _visible(spec.attention, kv_seq, document_len, training)
    for name in (EMBEDDING, HEAD):
        graph = _Graph(name, model, training, False)
        if name == EMBEDDING:
            graph.embedding(model)
        elif model.head or model.final_norm != "none":
            graph.head(model)
        items += graph.finish()
        sizes.update(graph.sizes)
    return Ledger(Axes(sizes), tuple(items), {})


def block_order(model: Model) -> list[str]:
    """Block kinds in the order of execution, one entry per layer: the encoder's layers, then the decoder's."""
    order = [ENCODER + name for name, repeat in model.encoder_layers for _ in range(repeat)]
    return order + [name for name, repeat in model.layers for _ in range(repeat)]


def _kinds(model: Model) -> list[tuple[str, Block, bool]]:
    """Every block kind once, with whether it runs on the encoder's tokens."""
    decoder = dict.fromkeys(name for name, _ in model.layers)
    encoder = dict.fromkeys(name for name, _ in model.encoder_layers)
    kinds = [(ENCODER + name, model.blocks[name], True) for name in encoder]
    return kinds + [(name, model.blocks[name], False) for name in decoder]


def _visible(
    attention: Attention, kv_seq: Array | float, document_len: float | None, training: bool
) -> Array | float:
    """Mean fraction of the keys that a query may see: causal mask, sliding window, packed documents."""
    keys = np.asarray(kv_seq, dtype=np.float64)
    if attention.cross:
        return np.ones_like(keys)
    span = keys if document_len is None or not training else np.minimum(keys, document_len)
    window = span if attention.window is None else np.minimum(span, attention.window)
    if attention.causal and training:
        return causal_fraction(span, span, window) * span / keys
    return window / keys


class _Graph:
    """Collects the items of one block kind; axis names of the block are qualified with its name."""

    def __init__(self, name: str, model: Model, training: bool, encoder: bool) -> None:
        self.name = name
        self.model = model
        self.training = training
        self.sizes: dict[str, Array | float] = {}
        self.items: list[Item] = []
        self.weights: dict[str, list[str]] = {"dense": [], "expert": []}
        prefix = "encoder_" if encoder else ""
        self.seq = f"{prefix}seq"
        self.residual = f"batch*{prefix}residual_seq*hidden"

    # -- blocks --------------------------------------------------------------------------------------------------

    def block(self, spec: Block) -> None:
        """A layer: mixers, then a feed-forward network, each behind a norm and followed by a residual addition."""
        first = True
        for mixer in (spec.attention, spec.ssm, spec.cross_attention):
            if mixer is None:
                continue
            self.norm("norm1" if first else "norm_cross", spec.norm)
            first = False
            if isinstance(mixer, Ssm):
                self.ssm(mixer)
            elif mixer.cross:
                self.attention(mixer, "cross")
            else:
                self.attention(mixer, "attention")
            if not spec.parallel:
                self.residual_add("mixer")
        for network in (spec.mlp, spec.moe):
            if network is None:
                continue
            if not spec.parallel:
                self.norm("norm2" if not first else "norm1", spec.norm)
            if isinstance(network, Moe):
                self.moe(network)
            else:
                self.mlp(network, "mlp", "ffn", owns_input=not spec.parallel)
            self.residual_add("mlp")
        for index in range(
            max(0, spec.norms - sum(i.what.startswith("norm") and i.phase == "forward" for i in self.items))
        ):
            self.norm(f"norm_post{index}", spec.norm)

    def embedding(self, model: Model) -> None:
        """Token and position lookup."""
        if model.vocab:
            self.weight("vocab*hidden")
        if model.learned_positions:
            self.weight(f"{model.learned_positions}*hidden")
        if model.extra_embedding_parameters:
            self.weight(f"{model.extra_embedding_parameters}")
        lookups = 2.0 + bool(model.learned_positions)
        self.stream("embedding", self.residual, lookups, 2.0, tags={"embedding"})
        if model.dropout:
            self.save("embedding.dropout_mask", self.residual, "embedding", mask=True)

    def head(self, model: Model) -> None:
        """Final norm, projection to the vocabulary, cross-entropy; logits live only while the head is at work."""
        if model.final_norm != "none":
            self.norm("final_norm", model.final_norm)
        if not (model.head and model.vocab):
            return
        self.matmul("head.logits", "batch*logit_seq", "vocab", "hidden", {"head", "column"}, out_bytes=4.0)
        self.save("head.input", self.residual, "norm")
        if model.tied_embeddings:
            self.tie("tied_copy*vocab*hidden")
        else:
            self.weight("vocab*hidden")
        if model.head_bias:
            self.weight("vocab")
        if not self.training:
            return
        # Eager cross-entropy keeps the logits and a separate gradient in fp32 (softmax, then its backward).
        tags = frozenset({"loss", "fp32"})
        for phase, passes in (("forward", 3.0), ("backward", 3.0)):
            self.items.append(
                Stream(
                    what="head.cross_entropy", block=self.name, phase=phase, tags=tags, launches=3.0,
                    size="batch*seq*vocab", bytes_per_element=4.0 * passes,
                )
            )  # fmt: skip
        for what in ("head.logits", "head.logits_gradient"):
            self.hold(what, "batch*seq*vocab", 4.0, "logits", tags={"loss", "fp32"})

    # -- mixers and networks ---------------------------------------------------------------------------------------

    def attention(self, spec: Attention, region: str) -> None:
        """Projections, rotary embedding, softmax(QKᵀ)V as eager kernels, output projection."""
        heads, kv_heads = self.axis(region, "heads", spec.heads), self.axis(region, "kv_heads", spec.kv_heads)
        rows, keys = f"batch*{self.seq}", "batch*encoder_seq" if spec.cross else f"batch*{self.seq}"
        if spec.latent:
            qk, v = self._latent_projections(spec, region, heads, rows)
            kv_width = f"{heads}*{qk} + {heads}*{v}"
            kv_heads = heads
        else:
            qk = v = self.axis(region, "head_dim", spec.head_dim)
            kv_width = f"{kv_heads}*{qk} + {kv_heads}*{v}"
            widths = [f"{heads}*{qk} + {kv_width}"] if not spec.cross else [f"{heads}*{qk}", kv_width]
            for index, width in enumerate(widths):
                name = "qkv" if not spec.cross else ("q", "kv")[index]
                self.matmul(f"{region}.{name}", keys if index else rows, width, "hidden", {"qkv", "column"})
                self.weight(*_products(width, "hidden"))
                if spec.qkv_bias:
                    self.weight(width)
            if spec.qk_norm:
                self.weight(f"2*{qk}")
                self.stream(
                    f"{region}.qk_norm",
                    f"{rows}*{heads}*{qk} + {keys}*{kv_heads}*{qk}",
                    _NORM,
                    _NORM_BACKWARD,
                    tags={"qkv"},
                )
        self.save(f"{region}.qkv_input", self.residual, "norm", "linear_input")
        if not self.model.learned_positions:
            self.stream(
                f"{region}.rope",
                f"{rows}*{heads}*{qk} + {keys}*{kv_heads}*{qk}",
                _ROPE,
                _ROPE,
                tags={"qkv", "mla_up"} if spec.latent else {"qkv"},
            )
        made_by = ("qkv", "mla_up") if spec.latent else ("qkv",)
        self.save(f"{region}.q", f"{rows}*{heads}*{qk}", *made_by)
        self.save(f"{region}.k", f"{keys}*{kv_heads}*{qk}", *made_by)
        self.save(f"{region}.v", f"{keys}*{kv_heads}*{v}", *made_by)
        self._eager_core(region, heads, kv_heads, qk, v, spec.cross)
        self.save(f"{region}.core_output", f"{rows}*{heads}*{v}", "core_attn", "linear_input")
        self.matmul(f"{region}.output", rows, "hidden", f"{heads}*{v}", {"attn_output", "row"})
        self.weight(f"hidden*{heads}*{v}")
        if spec.out_bias:
            self.weight("hidden")
        if spec.sinks:
            self.weight(heads)
        if not self.training:
            cached = (
                f"batch*kv_seq*{self.axis(region, 'latent', (spec.kv_lora_rank or 0) + spec.qk_rope_head_dim)}"
                if spec.latent
                else f"batch*kv_seq*{kv_heads}*{qk} + batch*kv_seq*{kv_heads}*{v}"
            )
            self.items.append(
                Resident(
                    what=f"{region}.kv_cache", block=self.name, tags=frozenset({"kv_cache", "activation"}), size=cached,
                    bytes_per_element=4.0, pool="kv_cache", lifetime="always",
                )
            )  # fmt: skip

    def _latent_projections(self, spec: Attention, region: str, heads: str, rows: str) -> tuple[str, str]:
        """Down- and up-projections of multi-head latent attention; returns the axes of the key and value widths."""
        qk = self.axis(region, "qk_dim", spec.qk_nope_head_dim + spec.qk_rope_head_dim)
        v = self.axis(region, "v_dim", spec.v_head_dim)
        up = self.axis(region, "kv_up", spec.qk_nope_head_dim + spec.v_head_dim)
        kv_rank = self.axis(region, "kv_rank", spec.kv_lora_rank or 0)
        down = self.axis(region, "kv_down", (spec.kv_lora_rank or 0) + spec.qk_rope_head_dim)
        tokens = self.residual.removesuffix(
            "*hidden"
        )  # down-projections and their norms run on the residual's tokens
        up_tags = {"qkv", "column", "mla_up"}
        if spec.q_lora_rank:
            q_rank = self.axis(region, "q_rank", spec.q_lora_rank)
            self.matmul(f"{region}.q_down", tokens, q_rank, "hidden", {"qkv", "replicated"})
            self.stream(f"{region}.q_norm", f"{tokens}*{q_rank}", _NORM, _NORM_BACKWARD, tags={"qkv"})
            self.matmul(f"{region}.q_up", rows, f"{heads}*{qk}", q_rank, up_tags)
            self.weight(f"hidden*{q_rank}", q_rank, f"{q_rank}*{heads}*{qk}")
            self.save(f"{region}.q_latent", f"2*{tokens}*{q_rank}", "qkv")
        else:
            self.matmul(f"{region}.q", rows, f"{heads}*{qk}", "hidden", up_tags)
            self.weight(f"hidden*{heads}*{qk}")
        self.matmul(f"{region}.kv_down", tokens, down, "hidden", {"qkv", "replicated"})
        self.stream(f"{region}.kv_norm", f"{tokens}*{kv_rank}", _NORM, _NORM_BACKWARD, tags={"qkv"})
        self.matmul(f"{region}.kv_up", rows, f"{heads}*{up}", kv_rank, up_tags)
        self.weight(f"hidden*{down}", kv_rank, f"{kv_rank}*{heads}*{up}")
        self.save(f"{region}.kv_latent", f"2*{tokens}*{kv_rank}", "qkv")
        return qk, v

    def _eager_core(self, region: str, heads: str, kv_heads: str, qk: str, v: str, cross: bool) -> None:
        """Scores, softmax, dropout and weighted sum as separate kernels that materialise the score matrix."""
        keys = "encoder_kv_seq" if cross or self.name.startswith(ENCODER) else "kv_seq"
        groups, scores = f"batch*{heads}", f"batch*{heads}*{self.seq}*{keys}"
        tags = {"core_attn"}
        self.matmul(f"{region}.scores", self.seq, keys, qk, tags, groups=groups)
        # Scale, mask and softmax: read scores, write probabilities; dropout reads them and writes the masked copy.
        passes = 2.0 + (2.0 if self.model.dropout else 0.0)
        self.stream(f"{region}.softmax", scores, passes, passes + 1.0, tags=tags)
        self.save(f"{region}.probabilities", scores, "core_attn")
        if self.model.dropout:
            self.save(f"{region}.probabilities_mask", scores, "core_attn", mask=True)
            self.save(f"{region}.probabilities_dropped", scores, "core_attn")
        self.matmul(f"{region}.context", self.seq, v, keys, tags, groups=groups)

    def mlp(self, spec: Mlp, region: str, axis: str, *, owns_input: bool = True) -> None:
        """Two or three matrices around an activation; ``owns_input``: nobody else saves the same input."""
        ffn = self.axis("", axis, spec.ffn)
        wide = f"2*{ffn}" if spec.gated else ffn
        rows = f"batch*{self.seq}"
        self.matmul(f"{region}.fc1", rows, wide, "hidden", {region, "column"})
        self.weight(*_products(wide, "hidden"), f"{ffn}*hidden")
        if spec.bias:
            self.weight(wide, "hidden")
        if owns_input:
            self.save(f"{region}.fc1_input", self.residual, "norm", "linear_input")
        self.save(f"{region}.act_input", *_products(wide, rows), region)
        self.stream(
            f"{region}.act",
            f"{rows}*{ffn}",
            3.0 if spec.gated else 2.0,
            5.0 if spec.gated else 3.0,
            tags={region, f"{region}_act"},
        )
        self.save(f"{region}.fc2_input", f"{rows}*{ffn}", f"{region}_act", region, "linear_input")
        self.matmul(f"{region}.fc2", rows, "hidden", ffn, {region, "row"})

    def moe(self, spec: Moe) -> None:
        """Router, permutation, grouped expert networks, weighted combination; an optional shared expert beside them."""
        experts, ffn = self.axis("", "experts", spec.experts), self.axis("", "expert_ffn", spec.expert_ffn)
        all_experts = self.axis("", "router_experts", spec.experts)
        top_k = self.axis("", "top_k", spec.top_k)
        tokens = self.residual.removesuffix("*hidden")
        per_expert = f"{tokens}*{top_k}*{self.axis('', 'expert_rows', 1.0)}/{all_experts}"
        routed = f"{tokens}*{top_k}*{experts}*{self.axis('', 'expert_rows', 1.0)}/{all_experts}"
        wide = f"2*{ffn}" if spec.gated else ffn
        self.matmul("moe.router", tokens, all_experts, "hidden", {"router", "replicated"})
        self.weight(f"hidden*{all_experts}")
        if spec.router_bias:
            self.weight(all_experts)
        self.save("moe.input", self.residual, "norm")
        self.stream(
            "moe.permute", f"{tokens}*{top_k}*hidden", 2.0, 2.0, tags={"moe", "dispatch"}, launches=2.0
        )
        self.save("moe.fc1_input", f"{routed}*hidden", "dispatch", "moe", "linear_input")
        common: dict[str, Any] = {"grouped": True, "groups": experts}
        self.matmul("moe.fc1", per_expert, wide, "hidden", {"moe", "expert"}, **common)
        self.save(
            "moe.act_input", *_products(wide, routed.replace(f"*{experts}", "", 1) + f"*{experts}"), "moe"
        )
        self.stream(
            "moe.act",
            f"{routed}*{ffn}",
            3.0 if spec.gated else 2.0,
            5.0 if spec.gated else 3.0,
            tags={"moe", "moe_act"},
        )
        self.save("moe.fc2_input", f"{routed}*{ffn}", "moe_act", "moe", "linear_input")
        self.matmul("moe.fc2", per_expert, "hidden", ffn, {"moe", "expert"}, **common)
        self.stream(
            "moe.unpermute", f"{tokens}*{top_k}*hidden", 2.0, 2.0, tags={"moe", "combine"}, launches=2.0
        )
        expert_weights = [*_products(wide, f"{experts}*hidden"), f"{experts}*{ffn}*hidden"]
        if spec.bias:
            expert_weights += _products(wide, experts) + [f"{experts}*hidden"]
        self.weights["expert"] += expert_weights
        if spec.shared_ffn:
            self.mlp(
                Mlp(spec.shared_ffn, spec.gated, spec.bias), "shared_expert", "shared_ffn", owns_input=False
            )
            if spec.shared_gate:
                self.weight("hidden")

    def ssm(self, spec: Ssm) -> None:
        """A Mamba mixer: input projection, short convolution, selective scan, gate, output projection."""
        inner, state = self.axis("", "ssm_inner", spec.inner), self.axis("", "ssm_state", spec.state_size)
        rows = f"batch*{self.seq}"
        conv = self.axis("", "ssm_conv", spec.conv_kernel)
        if spec.version == 1:
            rank = self.axis("", "ssm_rank", spec.dt_rank)
            self.matmul("ssm.in", rows, f"2*{inner}", "hidden", {"ssm", "column"})
            self.matmul("ssm.x", rows, f"{rank} + 2*{state}", inner, {"ssm", "row"})
            self.matmul("ssm.dt", rows, inner, rank, {"ssm", "column"})
            self.weight(
                f"2*hidden*{inner}", f"{inner}*{conv}", inner, f"{inner}*{rank}", f"2*{inner}*{state}"
            )
            self.weight(f"{rank}*{inner}", inner, f"{inner}*{state}", inner)
            convolved = inner
        else:
            heads, groups = self.axis("", "ssm_heads", spec.heads), self.axis("", "ssm_groups", spec.groups)
            width = f"2*{inner} + 2*{groups}*{state} + {heads}"
            convolved = f"{inner} + 2*{groups}*{state}"
            self.matmul("ssm.in", rows, width, "hidden", {"ssm", "column"})
            self.weight(
                *_products(width, "hidden"),
                *_products(convolved, conv),
                *convolved.split(" + "),
                f"3*{heads}",
                inner,
            )
        wide = " + ".join(_products(convolved, rows))
        self.save("ssm.in_input", self.residual, "norm", "linear_input")
        self.save("ssm.projected", f"2*{rows}*{inner}", "ssm")
        self.stream("ssm.conv", wide, 2.0, 4.0, tags={"ssm"})
        # The scan updates inner·state values per token: 6 FLOP each forward (decay, outer product, sum, output).
        self.stream("ssm.scan", f"{rows}*{inner}", 4.0, 8.0, tags={"ssm"}, flop=f"6*{spec.state_size}")
        self.save("ssm.scan_output", f"{rows}*{inner}", "ssm")
        self.matmul("ssm.out", rows, "hidden", inner, {"ssm", "row"})
        self.weight(f"{inner}*hidden")
        if not self.training:
            held = f"batch*{inner}*{state} + batch*{inner}*{conv}"
            self.items.append(
                Resident(
                    what="ssm.state", block=self.name, tags=frozenset({"kv_cache", "activation"}), size=held,
                    bytes_per_element=4.0, pool="kv_cache", lifetime="always",
                )
            )  # fmt: skip

    # -- small operators ---------------------------------------------------------------------------------------------

    def norm(self, what: str, kind: str) -> None:
        """A norm of hidden width; its input is the tensor that is kept."""
        self.stream(what, self.residual, _NORM, _NORM_BACKWARD, tags={"norm"})
        self.save(f"{what}.input", self.residual, "input" if what == "norm1" else "residual")
        self.weight(*["hidden"] * {"rmsnorm": 1, "layernorm": 2, "layernorm_nobias": 1, "none": 0}[kind])

    def residual_add(self, what: str) -> None:
        """Bias, dropout and residual addition, fused as every framework does."""
        self.stream(f"{what}.add", self.residual, _ADD, _ADD_BACKWARD, tags={"add"})
        if self.model.dropout:
            self.save(f"{what}.dropout_mask", self.residual, "add", mask=True)

    # -- emitting items ------------------------------------------------------------------------------------------------

    def axis(self, region: str, name: str, size: float) -> str:
        """Declares an axis of this block and returns its qualified name."""
        axis = f"{name}@{self.name}" + (".cross" if region == "cross" else "")
        self.sizes[axis] = float(size)
        return axis

    def weight(self, *sizes: str) -> None:
        """Weights of the dense mesh."""
        self.weights["dense"] += sizes

    def tie(self, size: str) -> None:
        """A weight shared with the embedding: a copy on the head's stage, whose gradient is summed with the original."""
        self.weights.setdefault("tied", []).append(size)

    def matmul(
        self, what: str, m: str, n: str, k: str, tags: set[str], groups: str = "1", grouped: bool = False,
        out_bytes: float | None = None,
    ) -> None:  # fmt: skip
        """Forward product, and its two backward products (input gradient, weight gradient)."""
        marks = frozenset(tags | {"gemm"})
        products: list[tuple[Phase, str, str, str]] = [("forward", m, n, k)]
        if self.training:
            weightless = "core_attn" in tags
            products += [("backward", m, k, n), ("backward" if weightless else "weight", k, n, m)]
        for phase, rows, columns, depth in products:
            self.items.append(
                Matmul(
                    what=what, block=self.name, phase=phase, tags=marks, m=rows, n=columns, k=depth, groups=groups,
                    grouped=grouped, out_bytes=out_bytes if phase == "forward" else None,
                )
            )  # fmt: skip

    def stream(
        self, what: str, size: str, forward: float, backward: float, *, tags: set[str], launches: float = 1.0,
        flop: str = "0",
    ) -> None:  # fmt: skip
        """A memory-bound kernel and its backward; traffic in activation elements of 4 bytes per element."""
        flops = float(np.prod([float(f) for f in flop.split("*")]))
        for phase, passes in (("forward", forward), ("backward", backward)):
            if phase == "forward" or self.training:
                self.items.append(
                    Stream(
                        what=what, block=self.name, phase=phase, tags=frozenset(tags | {"activation"}), size=size,
                        bytes_per_element=4.0 * passes, launches=launches, flop_per_element=flops * (1 if phase == "forward" else 2),
                    )
                )  # fmt: skip

    def save(self, what: str, size: str, *regions: str, mask: bool = False) -> None:
        """A tensor kept from forward to backward, produced in the first region (and inside the others)."""
        if not self.training:
            return
        tags = {"saved", *regions, *(() if mask else ("activation",))}
        self.items.append(
            Resident(
                what=what, block=self.name, tags=frozenset(tags), size=size, bytes_per_element=1.0 if mask else 4.0,
                pool="activations", lifetime="micro_batch",
            )
        )  # fmt: skip

    def hold(self, what: str, size: str, bytes_per_element: float, pool: str, *, tags: set[str]) -> None:
        """A tensor that lives only while the block is at work."""
        self.items.append(
            Resident(
                what=what, block=self.name, tags=frozenset(tags), size=size, bytes_per_element=bytes_per_element,
                pool=pool, lifetime="block",
            )
        )  # fmt: skip

    def finish(self) -> list[Item]:
        """All items, with the weights (and in training their gradients) summed per mesh."""
        for mesh, sizes in self.weights.items():
            if not sizes:
                continue
            pools = ("parameters", "gradients") if self.training else ("parameters",)
            for pool in pools:
                self.items.append(
                    Resident(
                        what=f"{mesh}_{pool}", block=self.name, tags=frozenset({pool, mesh}), size=_sum(sizes),
                        bytes_per_element=4.0, pool=pool, lifetime="always",
                    )
                )  # fmt: skip
        return self.items


def _products(total: str, factor: str) -> list[str]:
    """Each term of a sum times a factor."""
    return [f"{term}*{factor}" for term in total.split(" + ")]


def _sum(sizes: list[str]) -> str:
    """A sum of terms, equal terms counted together."""
    counts: dict[str, int] = {}
    for size in sizes:
        for term in size.split(" + "):
            counts[term] = counts.get(term, 0) + 1
    return " + ".join(term if count == 1 else f"{count}*{term}" for term, count in counts.items())
