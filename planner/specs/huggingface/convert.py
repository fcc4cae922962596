"""Puts a model together from a config.json: decoders here, other shapes in :mod:`stacks`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.specs.huggingface.families import FAMILIES, INEXPRESSIBLE, Family
from planner.specs.huggingface.fields import Fields
from planner.specs.huggingface.parts import Parts
from planner.specs.huggingface.pattern import layer_letters
from planner.specs.huggingface.stacks import encoder_decoder, vision
from planner.specs.layers import LayerPlan, arrange
from planner.specs.model import Model
from planner.specs.model_checks import violations

__all__ = ["model_from_config"]

# A model that also sees or hears keeps its language model's config under one of these.
_NESTED = (("thinker_config", "text_config"), ("text_config",), ("llm_config",), ("language_config",))
# Groups of keys that two families nest (DBRX, MPT).
_GROUPS = ("attn_config", "ffn_config")
_DROPOUT = ("resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout", "dropout_rate")
_DEFAULT_SEQ_LEN = 2048


def model_from_config(config: Mapping[str, Any], where: str = "config.json") -> Model:
    """The model that a Hugging Face config describes.

    Keys that say nothing about sizes are passed over. A ``model_type`` that we do not know is read by its
    fields, as LLaMA would be, and ``Model.extras["assumed"]`` says so.

    Args:
        config: the parsed config.json.
        where: the file that problems name; it also names the model where the config does not.

    Raises:
        SpecError: a size is missing or impossible, or the model is built from parts that we cannot express.
    """
    text, extras = _language_model(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    if model_type in INEXPRESSIBLE:
        raise SpecError(
            Problem(
                f"{where}: model_type",
                f"{model_type!r} has {INEXPRESSIBLE[model_type]}",
                "a model that these parts describe: attention, MLP, experts, state-space mixers",
                "Describe an approximation in a .toml file.",
            )
        )
    family = FAMILIES.get(model_type)
    if family is None:
        if text.get("is_encoder_decoder") is True:
            known = [name for name, known in FAMILIES.items() if known.arch == "encoder-decoder"]
            raise SpecError(
                Problem(f"{where}: model_type", repr(model_type), f"one of {', '.join(sorted(known))}")
            )
        family = FAMILIES["llama"]
        extras["assumed"] = f"unknown model_type {model_type!r}: read as a LLaMA-like decoder by its fields"
    fields = Fields(text, where)
    model = _build(fields, family, model_type or "unknown", _name(config, where), extras)
    problems = fields.problems or [
        Problem(f"{where}: {p}", found, expected) for p, found, expected in violations(model)
    ]
    if problems:
        raise SpecError(dict.fromkeys(problems))
    return model


def _language_model(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The part that describes the language model, with nested groups of keys unfolded."""
    extras: dict[str, str] = {}
    text: Mapping[str, Any] = config
    for path in _NESTED:
        inner: Any = config
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and len(inner) > 2:
            # Files of vision models keep the tie of the embeddings at the top.
            shared = {k: config[k] for k in ("tie_word_embeddings", "_name_or_path") if k in config}
            text = {**shared, **inner}
            extras["left out"] = "everything but the language model"
            break
    for group in _GROUPS:
        nested = text.get(group)
        if isinstance(nested, Mapping):
            text = {**{k: v for k, v in nested.items() if k != "model_type"}, **text}
    return text, extras


def _name(config: Mapping[str, Any], where: str) -> str:
    """The model's own name, else that of the file or of its folder."""
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/. "):
        return given.rstrip("/").rsplit("/", 1)[-1]
    path = Path(where)
    return path.resolve().parent.name if path.stem == "config" else path.stem.removesuffix("_config")


def _build(fields: Fields, family: Family, model_type: str, name: str, extras: dict[str, str]) -> Model:
    hidden = fields.size("hidden")
    parts = Parts(fields, family, hidden)
    max_seq_len = fields.size("max_seq_len", None)
    if max_seq_len is None:
        max_seq_len = _DEFAULT_SEQ_LEN
        extras["max_seq_len"] = f"not in the config: {_DEFAULT_SEQ_LEN} assumed"
    tied = fields.rule("tie_word_embeddings?" if family.tied else "tie_word_embeddings")
    shape: dict[str, Any] = {
        "vocab": 0 if family.arch == "vision" else fields.size("vocab"),
        "max_seq_len": max_seq_len,
        "tied_embeddings": tied,
        "learned_positions": 0
        if family.learned_positions is None
        else max_seq_len + family.learned_positions,
        "final_norm": family.final_norm or family.norm,
        "head_bias": fields.rule(family.head_bias),
    }
    if family.arch == "encoder-decoder":
        plan, special = encoder_decoder(parts, max_seq_len)
    elif family.arch == "vision":
        plan, special = vision(parts)
    else:
        plan, special = (
            _single_stack(parts),
            {"extra_embedding_parameters": _embedding_extras(parts, shape["vocab"])},
        )
    return Model(
        name=name,
        family=model_type,
        arch=family.arch,
        hidden=hidden,
        blocks=plan.blocks,
        layers=plan.layers,
        encoder_layers=plan.encoder_layers,
        mtp_layers=fields.size("mtp_layers", 0, minimum=0),
        checkpoint=_checkpoint(fields.config.get("quantization_config")),
        dropout=any(_positive(fields.config.get(key)) for key in _DROPOUT),
        source=fields.where,
        extras=extras,
        **{**shape, **special},
    )


def _single_stack(parts: Parts) -> LayerPlan:
    """A decoder's or an encoder's layers."""
    experts = parts.moe.experts if parts.moe is not None else 0
    letters = layer_letters(parts.fields, parts.family, experts)
    index_types = parts.fields.row("indexer_types") or []
    kinds = [(*pair, i < len(index_types) and index_types[i] == "shared") for i, pair in enumerate(letters)]
    blocks = {kind: parts.block(*kind) for kind in dict.fromkeys(kinds)}
    return arrange([blocks[kind] for kind in kinds])


def _embedding_extras(parts: Parts, vocab: int) -> int:
    """Embedding norm, token types and the masked language model's transform."""
    fields, family, hidden = parts.fields, parts.family, parts.hidden
    norm = 2 * hidden  # a layernorm, in every family that has one here
    total = norm if fields.rule(family.embedding_norm) else 0
    if family.token_types:
        total += fields.size("type_vocab_size", 2, minimum=0) * hidden
    if family.masked_lm_head:
        total += hidden * hidden + hidden + norm
    projected = fields.size("word_embed_proj_dim", hidden)
    if projected != hidden:
        fields.problem(
            "word_embed_proj_dim", f"{projected}", f"hidden_size ({hidden}): no projected embeddings"
        )
    return int(total)


def _checkpoint(quantisation: object) -> str:
    """Number format of the published linear layers, as far as kernels are known for it."""
    if not isinstance(quantisation, dict):
        return "bf16"
    method = quantisation.get("quant_method")
    if method == "fp8":
        return "fp8_block" if quantisation.get("weight_block_size") else "fp8"
    return "w4a16_mxfp4" if method == "mxfp4" else "bf16"


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
