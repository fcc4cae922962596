"""Which layer of a config.json is built how: its mixer and its network, one letter per layer.

Mixers: ``G`` attention, ``L`` attention within a window, ``M`` state-space mixer, ``H`` attention beside a
mixer. Networks: ``D`` dense, ``E`` experts. Layers of one part alone (Nemotron-H) leave the other one blank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planner.specs.huggingface.families import Family
from planner.specs.huggingface.fields import Fields

__all__ = ["NONE", "layer_letters"]

NONE = " "
_MIXERS = {
    "full_attention": "G",
    "attention": "G",
    "global": "G",
    "deepseek_sparse_attention": "G",
    "sliding_attention": "L",
    "chunked_attention": "L",
    "local": "L",
    "linear_attention": "M",
    "mamba": "M",
    "hybrid": "H",
}
# Layers of one part, by the sign in hybrid_override_pattern or the word in layers_block_type: mixer, network.
_SINGLE = {
    "M": ("M", NONE),
    "*": ("G", NONE),
    "-": (NONE, "D"),
    "E": (NONE, "E"),
    "mamba": ("M", NONE),
    "linear_attention": ("M", NONE),
    "attention": ("G", NONE),
    "full_attention": ("G", NONE),
    "mlp": (NONE, "D"),
    "moe": (NONE, "E"),
}


def layer_letters(fields: Fields, family: Family, experts: int) -> list[tuple[str, str]]:
    """The (mixer, network) letters of every layer; ``experts`` is 0 in a dense model."""
    single = _single_parts(fields)
    if single is not None:
        return single
    depth = fields.size("layers")
    if depth > 10_000:
        fields.problem("num_hidden_layers", f"{depth}", "at most 10000 layers")
        depth = 1
    mixers = _mixers(fields, family, depth)
    networks = _networks(fields, depth) if experts else [NONE if family.mixer_only else "D"] * depth
    return list(zip(mixers, networks, strict=True))


def _single_parts(fields: Fields) -> list[tuple[str, str]] | None:
    """Layers that are a mixer or a network alone, if this config is of that kind."""
    words: Sequence[Any] = fields.text("hybrid_override_pattern")
    key = "hybrid_override_pattern"
    if not words:
        key = "layers_block_type"
        words = fields.row(key) or ()
        if not any(word in ("mlp", "moe") for word in words):
            return None
    unknown = sorted({str(word) for word in words if word not in _SINGLE})
    if unknown:
        fields.problem(key, f"has {', '.join(unknown)}", f"layers out of {', '.join(_SINGLE)}")
    return [_SINGLE.get(word, ("G", NONE)) for word in words]


# -- mixers --------------------------------------------------------------------------------------------------


def _mixers(fields: Fields, family: Family, depth: int) -> list[str]:
    """The first rule that the config answers decides; a window that is not in use turns ``L`` into ``G``."""
    letters: list[str] | None = None
    for rule in (_by_list, _by_index, _by_period):
        letters = rule(fields, depth)
        if letters is not None:
            break
    windowed = fields.size("window", None, minimum=0) and fields.rule(family.window)
    if letters is None:
        pattern = family.mixers or ("L" if windowed else "G")
        letters = [pattern[i % len(pattern)] for i in range(depth)]
        # Qwen2: layers below max_window_layers keep full attention.
        full = fields.size("max_window_layers", 0, minimum=0)
        letters = ["G" if letter == "L" and i < full else letter for i, letter in enumerate(letters)]
    return letters if windowed else ["G" if letter == "L" else letter for letter in letters]


def _by_list(fields: Fields, depth: int) -> list[str] | None:
    """One word (or one 0/1 flag) per layer."""
    for key in ("layer_types", "layers_block_type", "attention_layers", "hybrid_layer_pattern"):
        words = fields.row(key)
        if words is None:
            continue
        table: Mapping[Any, str] = {0: "G", 1: "L"} if key == "hybrid_layer_pattern" else _MIXERS
        unknown = sorted({str(w) for w in words if not isinstance(w, int | str) or w not in table})
        if unknown or len(words) < depth:
            found = f"has {', '.join(unknown)}" if unknown else f"has {len(words)} entries"
            fields.problem(key, found, f"{depth} entries out of {', '.join(map(str, table))}")
            return ["G"] * depth
        return [table[word] for word in words[:depth]]
    return None


def _by_index(fields: Fields, depth: int) -> list[str] | None:
    """Attention at the listed layers, a state-space mixer elsewhere (Bamba)."""
    indices = fields.row("attn_layer_indices")
    return None if indices is None else ["G" if i in indices else "M" for i in range(depth)]


def _by_period(fields: Fields, depth: int) -> list[str] | None:
    """Every n-th layer differs."""
    if (period := fields.size("attn_layer_period", None)) is not None:  # Jamba
        offset = fields.size("attn_layer_offset", 0, minimum=0)
        return ["G" if i % period == offset else "M" for i in range(depth)]
    if (period := fields.size("full_attention_interval", None)) is not None:  # Qwen3-Next
        return ["G" if (i + 1) % period == 0 else "M" for i in range(depth)]
    pattern = fields.text("sliding_window_pattern")  # EXAONE: "LLLG"
    if pattern and set(pattern) <= set("LG"):
        return [pattern[i % len(pattern)] for i in range(depth)]
    if (
        not pattern and (period := fields.size("sliding_window_pattern", None)) is not None
    ):  # Gemma 3, Cohere 2
        return ["G" if (i + 1) % period == 0 else "L" for i in range(depth)]
    return None


# -- networks ------------------------------------------------------------------------------------------------


def _networks(fields: Fields, depth: int) -> list[str]:
    """``E`` where a layer has experts."""
    sparse = _sparse_layers(fields)
    return ["E" if sparse(i) else "D" for i in range(depth)]


def _sparse_layers(fields: Fields) -> Callable[[int], bool]:
    """Whether layer i has experts, by the first convention that the config follows."""
    if (words := fields.row("mlp_layer_types")) is not None:
        return lambda i: i < len(words) and words[i] == "sparse"
    if (flags := fields.row("moe_layer_freq")) is not None:
        return lambda i: i < len(flags) and bool(flags[i])
    if (listed := fields.row("moe_layers")) is not None:
        return lambda i: i in listed
    if (period := fields.size("expert_layer_period", None)) is not None:
        offset = fields.size("expert_layer_offset", 0, minimum=0)
        return lambda i: i % period == offset
    first = fields.size("first_dense", 0, minimum=0)
    last = fields.size("moe_layer_end_index", 10_000)
    every = fields.size("moe_every", 1)
    dense = fields.row("mlp_only_layers") or []
    return lambda i: first <= i <= last and (i + 1) % every == 0 and i not in dense
