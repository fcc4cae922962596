"""The model of a training row: from its columns, over what a shipped model of the same shape knows beyond them.

Columns say how many layers, heads and experts there are; they do not say that queries are normalised, that attention is latent or
windowed, or which layers are state-space mixers. Where the printed name, or the shape of the experts, is that of a shipped model,
its layers are the template, and the row's own numbers replace the template's. A row may hold fewer layers than the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from planner.errors import PlannerError
from planner.specs.layers import arrange
from planner.specs.model import Attention, Block, Mlp, Model, Moe
from planner.specs.model_checks import violations
from planner.specs.models import list_models, load_model
from planner.specs.parameters import parameter_count
from planner.validation.cells import Cells
from planner.validation.flags import Flags
from planner.validation.measured import flop_per_token
from planner.validation.table import Unsupported

__all__ = ["model_of"]

_ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "squared_relu", "")
_BILLION = 1e9
_TERA = 1e12


def model_of(cells: Cells, flags: Flags) -> Model:
    """The model that a row trained.

    Raises:
        Unsupported: the columns describe no model that there can be.
    """
    model = _model(cells, flags)
    model = replace(model, mtp_modules=_modules(model, cells, flags))
    wrong = [f"{path}: {found}" for path, found, _ in violations(model)]
    if wrong:
        raise Unsupported(f"no such model can be: {'; '.join(wrong)}")
    return model


def _model(cells: Cells, flags: Flags) -> Model:
    if cells.row.text("mlp").lower() not in _ACTIVATIONS:
        raise Unsupported(f"feed-forward network {cells.row.text('mlp')!r}: not modelled")
    template = _template(cells)
    if template is not None:
        return _adapted(template, cells)
    model = _plain(cells, flags, biased=cells.default("(biases)"))
    other = _plain(cells, flags, biased=not cells.default("(biases)"))
    return other if _fits_better(other, model, cells.row.text("n_params_b")) else model


def _modules(model: Model, cells: Cells, flags: Flags) -> int:
    """How many of the model's multi-token-prediction modules were trained: as the flags say, else as the printed FLOP count.

    Sources count attention in full or, under its causal mask, by half, which is as much as in full over half the length.
    """
    named, row = flags.whole("mtp-num-layers"), cells.row
    rate, achieved = row.number("tokens_per_s_per_device"), row.number("tflops_per_device")
    if named is not None or not (model.mtp_layers and rate and achieved and row.text("tflops_convention")):
        return named or 0
    printed, seq_len = achieved * _TERA / rate, cells.whole("seq_len")
    ways = [(n, length) for n in (0, model.mtp_layers) for length in (seq_len, seq_len // 2)]
    found = [flop_per_token(row, replace(model, mtp_modules=n), length) for n, length in ways]
    return min(zip(found, ways, strict=True), key=lambda one: abs(one[0] - printed))[1][0]


# -- a shipped model as template ---------------------------------------------------------------------------------------


def _template(cells: Cells) -> Model | None:
    """The shipped model that the row's name means or its experts are those of, if its shape is the row's."""
    named = _by_name(cells.row.text("model"))
    if named is not None and _same_shape(named, cells):
        return named
    if cells.row.whole("n_experts"):
        return next(
            (model for model in _mixtures() if _same_shape(model, cells) and _same_experts(model, cells)),
            None,
        )
    return None


@lru_cache(maxsize=512)
def _by_name(name: str) -> Model | None:
    """The shipped model that the name, or the beginning of it, means."""
    words = name.split()
    for count in range(len(words), 0, -1):
        try:
            return load_model(" ".join(words[:count]).rstrip(",;:"))
        except PlannerError:
            continue
    return None


@lru_cache(maxsize=1)
def _mixtures() -> tuple[Model, ...]:
    """Every shipped model with experts."""
    models = (load_model(name) for name in list_models())
    return tuple(model for model in models if any(block.moe for block in model.blocks.values()))


def _same_shape(model: Model, cells: Cells) -> bool:
    """Whether hidden size and heads are the row's, and it has no more layers."""
    heads = {block.attention.heads for block in model.blocks.values() if block.attention}
    return (
        model.arch == "decoder"
        and model.hidden == cells.row.whole("hidden")
        and cells.row.whole("n_heads") in heads
        and (cells.row.whole("n_layers") or 0) <= model.n_layers
        and bool(cells.row.whole("n_experts")) == any(block.moe for block in model.blocks.values())
    )


def _same_experts(model: Model, cells: Cells) -> bool:
    row = cells.row
    wanted = row.whole("n_experts"), row.whole("top_k"), row.whole("expert_ffn_hidden")
    return any(
        (b.moe.experts, b.moe.top_k, b.moe.expert_ffn) == wanted for b in model.blocks.values() if b.moe
    )


def _adapted(template: Model, cells: Cells) -> Model:
    """The template with the row's own numbers."""
    row = cells.row
    blocks = {name: _adapted_block(block, cells) for name, block in template.blocks.items()}
    order = [blocks[name] for name, repeat in template.layers for _ in range(repeat)]
    plan = arrange(_trimmed(order, cells))
    tied = row.truth("tied_embeddings")
    return replace(
        template,
        name=row.text("model") or template.name,
        vocab=row.whole("vocab") or template.vocab,
        tied_embeddings=template.tied_embeddings if tied is None else tied,
        blocks=plan.blocks,
        layers=plan.layers,
    )


def _adapted_block(block: Block, cells: Cells) -> Block:
    row, attention, mlp, moe = cells.row, block.attention, block.mlp, block.moe
    if attention is not None and not attention.latent:
        attention = replace(
            attention,
            kv_heads=row.whole("n_kv_heads") or attention.kv_heads,
            head_dim=row.whole("head_dim") or attention.head_dim,
        )
    if mlp is not None:
        mlp = replace(mlp, ffn=row.whole("ffn_hidden") or mlp.ffn)
    if moe is not None:
        wanted = {"experts": "n_experts", "top_k": "top_k", "expert_ffn": "expert_ffn_hidden"}
        moe = replace(moe, **{name: row.whole(column) for name, column in wanted.items()})  # type: ignore[arg-type]
    return replace(block, attention=attention, mlp=mlp, moe=moe)


def _trimmed(order: list[Block], cells: Cells) -> list[Block]:
    """As many layers as the row has: of each kind as many as it says, else the template's first ones."""
    layers, experts = cells.whole("n_layers"), cells.row.whole("moe_layers")
    if layers == len(order):
        return order
    kinds = {block.moe is not None for block in order}
    if experts is None or len(kinds) == 1:
        return order[:layers]
    dense = next(block for block in order if block.moe is None)
    mixture = next(block for block in order if block.moe is not None)
    return [dense] * (layers - experts) + [mixture] * experts


# -- columns alone -----------------------------------------------------------------------------------------------------


def _plain(cells: Cells, flags: Flags, *, biased: bool) -> Model:
    """A decoder of attention and one network per layer, GPT's or Llama's as its activation says."""
    norm = "rmsnorm" if cells.gated or flags.values.get("normalization") == "RMSNorm" else "layernorm"
    if not biased and norm == "layernorm":
        norm = "layernorm_nobias"
    linear_bias = biased and flags.values.get("disable-bias-linear", "").lower() != "true"
    learned = cells.default("(positions)") and flags.values.get("position-embedding-type", "") in (
        "",
        "learned_absolute",
    )
    layers = list(_layers(cells, flags, norm, linear_bias))
    plan = arrange(layers)
    seq_len = cells.whole("seq_len")
    return Model(
        name=cells.row.text("model") or cells.row.row_id, family="decoder", arch="decoder", hidden=cells.whole("hidden"),
        vocab=cells.whole("vocab"), max_seq_len=seq_len, blocks=plan.blocks, layers=plan.layers,
        tied_embeddings=cells.truth("tied_embeddings"), learned_positions=seq_len if learned else 0, final_norm=norm,
        dropout=cells.default("(dropout)"), source=f"{cells.row.file}, {cells.row.row_id}",
    )  # fmt: skip


def _layers(cells: Cells, flags: Flags, norm: str, biased: bool) -> Iterator[Block]:
    mlp = Mlp(cells.whole("ffn_hidden"), cells.gated, biased)
    experts = cells.row.whole("n_experts")
    count = cells.whole("n_layers")
    mixtures = min(cells.whole("moe_layers"), count) if experts else 0
    dense = Block(attention=_attention(cells, flags, biased), mlp=mlp, norm=norm)
    mixture = replace(dense, mlp=None, moe=_moe(cells, flags, biased)) if experts else dense
    pattern = _expert_pattern(flags, count) if experts else None
    for layer in range(count):
        yield mixture if (pattern[layer] if pattern else layer >= count - mixtures) else dense


def _attention(cells: Cells, flags: Flags, biased: bool) -> Attention:
    heads, width = cells.whole("n_heads"), cells.whole("head_dim")
    if flags.values.get("multi-latent-attention", "").lower() != "true":
        return Attention(heads, cells.whole("n_kv_heads"), width, qkv_bias=biased, out_bias=biased)
    nope, rope = flags.whole("qk-head-dim") or 128, flags.whole("qk-pos-emb-head-dim") or 64
    return Attention(
        heads, heads, nope + rope, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=flags.whole("v-head-dim") or 128,
        q_lora_rank=flags.whole("q-lora-rank"), kv_lora_rank=flags.whole("kv-lora-rank") or 32, out_bias=biased,
    )  # fmt: skip


def _moe(cells: Cells, flags: Flags, biased: bool) -> Moe:
    width = cells.whole("expert_ffn_hidden")
    shared = flags.whole("moe-shared-expert-intermediate-size") or cells.whole("n_shared_experts") * width
    return Moe(cells.whole("n_experts"), cells.whole("top_k"), width, shared, cells.gated, biased)


def _expert_pattern(flags: Flags, count: int) -> list[bool] | None:
    """Which layers have experts, where the flags spell it out as a sum of repeated zeros and ones."""
    text = flags.values.get("moe-layer-freq", "")
    runs = re.findall(r"\[([01])\]\*(\d+)", flags.text if text else "")
    pattern = [sign == "1" for sign, repeat in runs for _ in range(int(repeat))]
    return pattern if len(pattern) == count else None


def _fits_better(other: Model, model: Model, printed: str) -> bool:
    """Whether the printed parameter count, in billions, tells the two apart and is nearer to the other."""
    digits = re.fullmatch(r"\d+\.(\d+)", printed)
    if digits is None:
        return False
    wanted, rounding = float(printed), 0.5 * 10.0 ** -len(digits[1])
    ours, theirs = (abs(parameter_count(m) / _BILLION - wanted) for m in (model, other))
    return ours > rounding and theirs < ours
