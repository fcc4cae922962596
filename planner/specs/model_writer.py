"""Writes a model as the TOML file that :mod:`planner.specs.model_file` reads, and proves it by reading it back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from planner.errors import Problem, SpecError
from planner.specs.model import Block, Model
from planner.specs.model_file import model_from_table

__all__ = ["model_toml"]

_NEVER_WRITTEN = ("causal", "cross")  # follow from arch
_NO_SIZES = ("source", "extras", "exception", "published_parameters", "published_active_parameters",
             "published_digits", "published_active_digits")  # fmt: skip
_LETTERS = {"ssm": "M", "attention": "*", "mlp": "-", "moe": "E"}


def model_toml(model: Model, source: str) -> str:
    """The model as the text of a ``.toml`` file.

    Args:
        model: the model.
        source: where its sizes come from.

    Raises:
        SpecError: it has parts that the file format cannot express.
    """
    text = _toml(_table(model, source))
    try:
        again = model_from_table(tomllib.loads(text), model.name, model.name)
    except SpecError as error:
        raise _inexpressible(model, str(error.problems[0])) from None
    for field in fields(Model):
        if field.name not in _NO_SIZES and getattr(again, field.name) != getattr(model, field.name):
            raise _inexpressible(model, f"{field.name} would read {str(getattr(again, field.name))[:60]}")
    return text


def _inexpressible(model: Model, reason: str) -> SpecError:
    found = f"the layers of {model.name} do not fit the file format ({reason})"
    return SpecError(
        Problem("model", found, "layers in a repeating pattern", "Use the config.json itself as --model.")
    )


def _table(model: Model, source: str) -> dict[str, Any]:
    """The file's keys, plain ones first, as its format orders them."""
    decoder, encoder = _expanded(model, model.layers), _expanded(model, model.encoder_layers)
    blocks = decoder + encoder
    table: dict[str, Any] = {
        "family": model.family,
        "arch": model.arch,
        "hidden": model.hidden,
        "layers": len(decoder),
        "vocab": model.vocab,
        "max_seq_len": model.max_seq_len,
        "norm": blocks[0].norm,
        "final_norm": model.final_norm,
        "source": source,
    }
    if encoder:
        table["encoder_layers"] = len(encoder)
    if not model.encoder_tokens:
        table["encoder_tokens"] = False
    for name in ("tied_embeddings", "head_bias", "dropout", "learned_positions", "mtp_layers", "mtp_modules"):
        if getattr(model, name):
            table[name] = getattr(model, name)
    if model.checkpoint != "bf16":
        table["checkpoint"] = model.checkpoint
    if model.head != (model.arch != "vision"):
        table["head"] = model.head
    if any(block.parallel for block in blocks):
        table["parallel"] = True
    table.update(_layout(decoder))
    counts = {block.norms for block in blocks}
    if "layer_parts" not in table and len(counts) == 1 and counts != {_usual_norms(blocks[0])}:
        table["norms"] = counts.pop()
    if model.extra_embedding_parameters:
        table["extra_parameters"] = {"embedding": model.extra_embedding_parameters}
    for name in _LETTERS:
        part = _part(blocks, name)
        if part is not None:
            table[name] = _written(part)
    return table


def _expanded(model: Model, runs: Sequence[tuple[str, int]]) -> list[Block]:
    return [model.blocks[name] for name, repeat in runs for _ in range(repeat)]


def _usual_norms(block: Block) -> int:
    parts = (block.attention, block.cross_attention, block.ssm, block.mlp, block.moe)
    return 1 if block.parallel else sum(part is not None for part in parts)


def _layout(blocks: Sequence[Block]) -> dict[str, Any]:
    """Which layer is built how."""
    if (
        any((b.attention is None and b.ssm is None) or (b.mlp is None and b.moe is None) for b in blocks)
        and len({_parts(b) for b in blocks}) > 1
    ):
        return {"layer_parts": "".join(_LETTERS.get("+".join(_parts(b)), "?") for b in blocks)}
    found: dict[str, Any] = {}
    mixers = "".join("M" if b.attention is None else "L" if b.attention.window else "G" for b in blocks)
    if len(set(mixers)) > 1:
        period = next(
            n
            for n in range(1, len(mixers) + 1)
            if all(mixers[i] == mixers[i % n] for i in range(len(mixers)))
        )
        found["layer_mixers"] = mixers[:period]
    experts = [b.moe is not None for b in blocks]
    if any(experts) and not all(experts):
        found.update(_placement(experts))
    return found


def _parts(block: Block) -> tuple[str, ...]:
    return tuple(name for name in _LETTERS if getattr(block, name) is not None)


def _placement(experts: Sequence[bool]) -> dict[str, int]:
    """``first_dense_layers`` and ``moe_every`` that put the experts where they are, if there are such."""
    first = experts.index(True)
    for every in range(1, len(experts) + 1):
        for dense in (0, first):
            if all(here == (i >= dense and (i + 1) % every == 0) for i, here in enumerate(experts)):
                return {
                    name: n
                    for name, n in (("first_dense_layers", dense), ("moe_every", every))
                    if n > (name[0] == "m")
                }
    return {}


def _part(blocks: Sequence[Block], name: str) -> Any:
    """The part of the blocks that have one; of several attentions, the one with a window."""
    parts = [part for block in blocks if (part := getattr(block, name)) is not None]
    windowed = [part for part in parts if getattr(part, "window", None)]
    return (windowed or parts or [None])[0]


def _written(part: Any) -> dict[str, Any]:
    """A part's fields that are not at their defaults; those without a default always."""
    values: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        derived = (part.__class__.__name__, field.name) in (("Ssm", "dt_rank"), ("Ssm", "inner"))
        if field.name not in _NEVER_WRITTEN and (
            field.default is MISSING or value != field.default or derived
        ):
            values[field.name] = value
    if values.get("kv_lora_rank") is not None:  # the widths of latent attention follow from its own keys
        values.pop("head_dim", None)
    return values


def _toml(table: Mapping[str, Any]) -> str:
    """Plain keys, then tables; strings are quoted as JSON quotes them, which TOML reads."""
    plain = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    lines = "\n".join(plain) + "\n"
    for name, part in table.items():
        if isinstance(part, dict):
            body = "\n".join(f"{key} = {json.dumps(value)}" for key, value in part.items())
            lines += f"\n[{name}]\n{body}\n"
    return lines
