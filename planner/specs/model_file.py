"""A model's TOML file: sizes once, and short patterns that say which layer is built how.

::

    family = "llama3.1"          # arch = "decoder" | "encoder" | "encoder-decoder" | "vision"
    hidden = 16384
    layers = 126
    vocab = 128256
    max_seq_len = 131072
    published_parameters = "405B"      # as printed; its digits count
    source = "arXiv:2407.21783 Table 3"

    [attention]
    heads = 128
    kv_heads = 8

    [mlp]
    ffn = 53248

Which layer is built how: ``first_dense_layers`` and ``moe_every`` place the experts (layer i, from 0, has
experts if i ≥ first_dense_layers and i + 1 is a multiple of moe_every); ``layer_mixers`` is one letter per
layer, repeated: ``G`` attention, ``L`` attention within ``window``, ``M`` state-space mixer; ``layer_parts``
is for models whose layers are a mixer or a network alone (Nemotron-H), one sign per layer: ``M`` ssm, ``*``
attention, ``-`` mlp, ``E`` moe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from planner.errors import Problem
from planner.specs.formats import KERNEL_FORMATS
from planner.specs.layers import arrange
from planner.specs.model import Attention, Block, Mlp, Model, Moe, Ssm
from planner.specs.model_checks import violations
from planner.specs.reader import REQUIRED, Reader
from planner.units import parse_count

__all__ = ["model_from_table"]

_NORMS = ("rmsnorm", "layernorm", "layernorm_nobias", "none")
_ARCHS = ("decoder", "encoder", "encoder-decoder", "vision")
_MAX_LAYERS = 10_000
_MAX_SIZE = 10**9
_Part = TypeVar("_Part", Attention, Mlp, Moe, Ssm)


def model_from_table(data: Mapping[str, Any], name: str, where: str) -> Model:
    """The model in a TOML table (see the module's docstring).

    Args:
        data: the table.
        name: the model's name.
        where: the file that problems name.

    Raises:
        SpecError: unknown or missing keys, wrong types, sizes that cannot be; all at once.
    """
    reader = Reader(data, where)
    sizes = _sizes(reader)
    parts = _Parts(reader, sizes["hidden"], causal=sizes["arch"] not in ("encoder", "vision"))
    plan = arrange(*parts.stacks(sizes["arch"] == "encoder-decoder"))
    total, digits = _printed(reader, "published_parameters")
    active, active_digits = _printed(reader, "published_active_parameters")
    model = Model(
        name=name,
        **sizes,
        blocks=plan.blocks,
        layers=plan.layers,
        encoder_layers=plan.encoder_layers,
        final_norm=reader.text("final_norm", parts.norm, choices=_NORMS),
        extra_embedding_parameters=_extra(reader),
        published_parameters=total,
        published_active_parameters=active,
        published_digits=digits,
        published_active_digits=active_digits,
        exception=reader.text("exception", ""),
        source=reader.text("source"),
    )
    reader.finish()
    _add_violations(reader, model)
    reader.raise_if_any()
    return model


def _sizes(reader: Reader) -> dict[str, Any]:
    """The plain top-level entries, by field of :class:`Model`."""
    arch = reader.text("arch", "decoder", choices=_ARCHS)
    vision = arch == "vision"
    return {
        "family": reader.text("family"),
        "arch": arch,
        "hidden": reader.integer("hidden", maximum=_MAX_SIZE),
        "vocab": reader.integer("vocab", 0 if vision else REQUIRED, minimum=0, maximum=_MAX_SIZE),
        "max_seq_len": reader.integer("max_seq_len", maximum=_MAX_SIZE),
        "learned_positions": reader.integer("learned_positions", 0, minimum=0, maximum=_MAX_SIZE),
        "encoder_tokens": reader.boolean("encoder_tokens", True),
        "tied_embeddings": reader.boolean("tied_embeddings", False),
        "head": reader.boolean("head", not vision),
        "head_bias": reader.boolean("head_bias", False),
        "mtp_layers": reader.integer("mtp_layers", 0, minimum=0, maximum=_MAX_LAYERS),
        "mtp_modules": reader.integer("mtp_modules", 0, minimum=0, maximum=_MAX_LAYERS),
        "checkpoint": reader.text("checkpoint", "bf16", choices=KERNEL_FORMATS),
        "dropout": reader.boolean("dropout", False),
    }


class _Parts:
    """The part tables of a file, and the layers that its patterns build from them."""

    def __init__(self, reader: Reader, hidden: int, *, causal: bool) -> None:
        self.reader = reader
        self.norm = reader.text("norm", "rmsnorm", choices=_NORMS)
        self.norms = reader.integer("norms", None, minimum=0, maximum=16)
        self.parallel = reader.boolean("parallel", False)
        self.attention = _attention(reader.table("attention", None), hidden, causal)
        self.mlp = _part(reader.table("mlp", None), Mlp, {})
        self.moe = _part(reader.table("moe", None), Moe, {})
        self.ssm = _ssm(reader.table("ssm", None), hidden)
        self.first_dense = reader.integer("first_dense_layers", 0, minimum=0, maximum=_MAX_LAYERS)
        self.moe_every = reader.integer("moe_every", 1, maximum=_MAX_LAYERS)

    def stacks(self, encoder_decoder: bool) -> tuple[list[Block], list[Block]]:
        """Blocks of the decoder (or only) stack, and of the encoder."""
        depth = self.reader.integer("layers", maximum=_MAX_LAYERS)
        encoder_depth = (
            self.reader.integer("encoder_layers", depth, maximum=_MAX_LAYERS) if encoder_decoder else 0
        )
        if self.reader.has("layer_parts"):
            return self._single_parts(depth), []
        mixers = self._mixers()
        mixed = [mixers[i % len(mixers)] for i in range(max(depth, encoder_depth))]
        networks = [self._network(i) for i in range(max(depth, encoder_depth))]
        kinds: dict[tuple[str, str, bool | None], Block] = {}

        def layer(index: int, cross: bool | None) -> Block:
            key = (mixed[index], networks[index], cross)
            if key not in kinds:
                kinds[key] = self._block(*key)
            return kinds[key]

        decoder = [layer(index, encoder_decoder) for index in range(depth)]
        return decoder, [layer(index, None) for index in range(encoder_depth)]

    def _block(self, mixer: str, network: str, cross: bool | None) -> Block:
        """A layer; ``cross`` is None in an encoder, else whether the layer looks at one."""
        attention = None if self.attention is None or mixer == "M" else self.attention
        if attention is not None and (mixer == "G" or cross is None):
            window = attention.window if mixer == "L" else None
            causal = attention.causal and cross is not None
            attention = dataclasses.replace(attention, window=window, causal=causal)
        parts: dict[str, Any] = {
            "attention": attention,
            "cross_attention": self._cross() if cross else None,
            "ssm": self.ssm if mixer == "M" else None,
            "mlp": self.mlp if network == "-" else None,
            "moe": self.moe if network == "E" else None,
        }
        present = sum(part is not None for part in parts.values())
        norms = self.norms if self.norms is not None else 1 if self.parallel else present
        return Block(**parts, norm=self.norm, norms=norms, parallel=self.parallel)

    def _cross(self) -> Attention | None:
        if self.attention is None:
            return None
        return dataclasses.replace(self.attention, cross=True, causal=False, window=None)

    def _network(self, index: int) -> str:
        """The sign of a layer's network: experts where the pattern says so, else the MLP (if any)."""
        if self.moe is not None and index >= self.first_dense and (index + 1) % self.moe_every == 0:
            return "E"
        return "-" if self.mlp is not None else ""

    def _mixers(self) -> str:
        default = "M" if self.attention is None and self.ssm is not None else "G"
        if self.attention is not None and self.attention.window:
            default = "L"
        pattern: str = self.reader.text("layer_mixers", default) or default
        needs = {"G": self.attention, "L": self.attention and self.attention.window, "M": self.ssm}
        self._check_letters("layer_mixers", pattern, needs)
        if self.moe is not None and self.mlp is None and (self.first_dense or self.moe_every > 1):
            self.reader.problem("mlp", "is missing", "a table, since some layers have no experts")
        return pattern

    def _single_parts(self, depth: int) -> list[Block]:
        pattern: str = self.reader.text("layer_parts")
        needs = {"M": self.ssm, "*": self.attention, "-": self.mlp, "E": self.moe}
        self._check_letters("layer_parts", pattern, needs)
        if len(pattern) != depth:
            self.reader.problem("layer_parts", f"has {len(pattern)} signs", f"one per layer ({depth})")
        kinds = {
            "M": Block(norm=self.norm, norms=1, ssm=self.ssm),
            "*": Block(norm=self.norm, norms=1, attention=self.attention),
            "-": Block(norm=self.norm, norms=1, mlp=self.mlp),
            "E": Block(norm=self.norm, norms=1, moe=self.moe),
        }
        return [kinds[sign] for sign in pattern if sign in kinds][:_MAX_LAYERS]

    def _check_letters(self, key: str, pattern: str, needs: Mapping[str, Any]) -> None:
        for letter in dict.fromkeys(pattern):
            if letter not in needs:
                self.reader.problem(key, f"has {letter!r}", f"signs out of {' '.join(needs)}")
            elif not needs[letter]:
                table = {"M": "[ssm]", "L": "[attention] with window", "-": "[mlp]", "E": "[moe]"}.get(
                    letter, "[attention]"
                )
                self.reader.problem(key, f"has {letter!r} without its table", table)


def _attention(reader: Reader | None, hidden: int, causal: bool) -> Attention | None:
    if reader is None:
        return None
    heads = reader.integer("heads", maximum=_MAX_SIZE)
    derived = {"kv_heads": heads, "causal": causal, "cross": False, "head_dim": max(1, hidden // heads)}
    if reader.has("kv_lora_rank"):
        # Under MLA a head's width is that of its query and key.
        derived["head_dim"] = sum(
            int(reader.data.get(key, 0)) if type(reader.data.get(key, 0)) is int else 0
            for key in ("qk_nope_head_dim", "qk_rope_head_dim")
        )
    elif not reader.has("head_dim") and hidden % heads:
        reader.problem(
            "heads", f"{heads} does not divide hidden = {hidden}", "a divisor of hidden, or head_dim"
        )
    return _part(reader, Attention, derived)


def _ssm(reader: Reader | None, hidden: int) -> Ssm | None:
    if reader is None:
        return None
    version = reader.integer("version", maximum=2)
    # The defaults of the papers' code: expansion 2, and a rank of hidden / 16, rounded up.
    return _part(reader, Ssm, {"inner": 2 * hidden, "dt_rank": -(-hidden // 16) if version == 1 else 0})


def _part(reader: Reader | None, kind: type[_Part], derived: Mapping[str, Any]) -> _Part | None:
    """A table whose keys are the fields of a part; ``derived`` replaces defaults."""
    if reader is None:
        return None
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        default = field.default if field.default is not dataclasses.MISSING else REQUIRED
        default = derived.get(field.name, default)
        if field.name in ("causal", "cross"):
            values[field.name] = default
        elif field.type == "bool":
            values[field.name] = reader.boolean(field.name, default)
        else:
            minimum = 0 if default in (0, None) and default is not REQUIRED else 1
            values[field.name] = reader.integer(field.name, default, minimum=minimum, maximum=_MAX_SIZE)
    reader.finish()
    return kind(**values)


def _printed(reader: Reader, key: str) -> tuple[float | None, int]:
    """A printed size such as "405B" or "1.37B": the number, and how many digits were printed."""
    text = reader.text(key, None)
    if text is None:
        return None, 0
    try:
        value = parse_count(text)
    except ValueError as error:
        reader.problem(key, str(error), 'a printed size such as "405B"')
        return None, 0
    if value <= 0:
        reader.problem(key, text, "a positive size")
        return None, 0
    return value, sum(c.isdigit() for c in text.lower().split("e")[0].lstrip("0. "))


def _extra(reader: Reader) -> int:
    """The sum of ``[extra_parameters]``: weights beside the layers, named by what they are."""
    table = reader.table("extra_parameters", None)
    if table is None:
        return 0
    keys = table.keys()
    total = sum(table.integer(key, minimum=0, maximum=10**12) for key in keys)
    table.finish()
    return int(total)


def _add_violations(reader: Reader, model: Model) -> None:
    """Notes impossible relations, but not those of a table that already has a problem of its own."""
    wrong = [
        problem.where.removeprefix(f"{reader.where}: ")
        for problem in reader.problems
        if problem.found != "unknown key"
    ]
    for path, found, expected in violations(model):
        table, _, _ = path.rpartition(".")
        if not any(place == path or (table and place.startswith(f"{table}.")) for place in wrong):
            reader.problems.append(Problem(f"{reader.where}: {path}", found, expected))
