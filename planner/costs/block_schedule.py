"""Generation with weights, cache and activations spread over device, host and disk: FlexGen's zig-zag block schedule.

A block of several batches goes through the model layer by layer: a layer's weights are brought once for all batches of the block,
while caches and activations of the batches come and go. Symbols per layer: weights of ``w`` bytes, ``κ`` bytes of keys and
values per token, ``η`` bytes of hidden states per token; ``b`` sequences in a block, prompts of ``s``, answers of ``n`` tokens.

Sources: Y. Sheng et al., "FlexGen", ICML 2023, arXiv:2303.06865, section 4.3 and appendix A.3; FMInference/FlexLLMGen,
``experimental/cost_model.py`` (which streams overlap).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BLOCK_PLACES", "BlockLinks", "BlockWork", "block_layer_s", "block_tokens_per_s"]

BLOCK_PLACES = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class BlockLinks:
    """Bytes per second of the ways between device, host and disk, as far as engines get them.

    Attributes:
        to_device: weights, cache and activations on their way in.
        cache_to_host, hidden_to_host: on their way out.
        from_disk: reading.
        cache_to_disk, hidden_to_disk: writing while prompts run; ``to_disk`` while answers are generated.
    """

    to_device: float
    cache_to_host: float
    hidden_to_host: float
    from_disk: float
    cache_to_disk: float
    hidden_to_disk: float
    to_disk: float


@dataclass(frozen=True, slots=True)
class BlockWork:
    """What a layer of a block holds and computes.

    Attributes:
        weights_bytes, cache_bytes_per_token, hidden_bytes_per_token: ``w``, ``κ``, ``η``.
        sequences, prompt_tokens, answer_tokens: ``b``, ``s``, ``n``.
        prefill_s: computing the prompts of a block.
        decode_s: computing a token of each of its sequences, without attention to the cache.
        attention_device_s, attention_host_s: that attention, of a cache that lies wholly on the device, or wholly beyond it.
    """

    weights_bytes: float
    cache_bytes_per_token: float
    hidden_bytes_per_token: float
    sequences: float
    prompt_tokens: float
    answer_tokens: float
    prefill_s: float
    decode_s: float
    attention_device_s: float
    attention_host_s: float


def block_layer_s(
    work: BlockWork, links: BlockLinks, placed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
    """Seconds of a layer by stream: ``(prefill streams)``, what a step of generation adds, and ``(its streams)``.

    The prompts take the longest of ``weights in and from disk``, ``caches out and to disk``, ``compute``; a step of generation
    takes the way in, and the longest of what overlaps with it: ``way out``, ``from disk``, ``to disk``, ``compute``.

    Args:
        work: of the block.
        links: between the places.
        placed: fractions by ``weights.host``, ``cache.disk`` …: linear in them, so that they may be a program's variables.

    >>> links = BlockLinks(10.0, 10.0, 10.0, 5.0, 5.0, 5.0, 5.0)
    >>> work = BlockWork(100.0, 0.0, 0.0, 4.0, 8.0, 2.0, 30.0, 3.0, 0.0, 0.0)
    >>> placed = {f"{what}.{place}": 0.0 for what in ("weights", "cache", "hidden") for place in BLOCK_PLACES}
    >>> block_layer_s(work, links, {**placed, "weights.host": 1.0})  # 100 bytes come in for every step
    ((10.0, 0.0, 30.0), 10.0, (0.0, 0.0, 0.0, 3.0))
    """
    b, s, n = work.sequences, work.prompt_tokens, work.answer_tokens
    away = {what: placed[f"{what}.host"] + placed[f"{what}.disk"] for what in ("weights", "cache", "hidden")}
    on_disk = {what: placed[f"{what}.disk"] for what in away}
    hidden, cache = work.hidden_bytes_per_token * b, work.cache_bytes_per_token * b
    weights = work.weights_bytes
    in_s = away["weights"] * (weights / links.to_device) + away["hidden"] * (s * hidden / links.to_device)
    read_s = on_disk["weights"] * (weights / links.from_disk) + on_disk["hidden"] * (
        s * hidden / links.from_disk
    )
    out_s = away["cache"] * ((s + 1.0) * cache / links.cache_to_host) + away["hidden"] * (
        s * hidden / links.hidden_to_host
    )
    write_s = on_disk["cache"] * ((s + 1.0) * cache / links.cache_to_disk) + on_disk["hidden"] * (
        s * hidden / links.hidden_to_disk
    )
    prefill = (in_s + read_s, out_s + write_s, work.prefill_s)
    step_in_s = away["weights"] * (weights / links.to_device) + away["hidden"] * (hidden / links.to_device)
    step_out_s = away["hidden"] * (hidden / links.hidden_to_host)
    seen = (s + n / 2.0) * cache / links.from_disk
    step_read_s = on_disk["cache"] * seen + on_disk["hidden"] * (hidden / links.from_disk)
    step_read_s = step_read_s + on_disk["weights"] * (weights / (_READ_AHEAD * links.from_disk))
    step_write_s = on_disk["cache"] * (cache / links.to_disk) + on_disk["hidden"] * (hidden / links.to_disk)
    compute_s = (
        placed["cache.device"] * work.attention_device_s
        + away["cache"] * work.attention_host_s
        + work.decode_s
    )
    return prefill, step_in_s, (step_out_s, step_read_s, step_write_s, compute_s)


def block_tokens_per_s(
    work: BlockWork, links: BlockLinks, layers: float, placed: Mapping[str, float]
) -> float:
    """Tokens per second of blocks that follow each other: ``b·n/(L·(T_prefill + (n − 1)·T_step))``.

    >>> links = BlockLinks(10.0, 10.0, 10.0, 5.0, 5.0, 5.0, 5.0)
    >>> work = BlockWork(100.0, 0.0, 0.0, 4.0, 8.0, 2.0, 30.0, 3.0, 0.0, 0.0)
    >>> placed = {f"{what}.{place}": 0.0 for what in ("weights", "cache", "hidden") for place in BLOCK_PLACES}
    >>> round(block_tokens_per_s(work, links, 1.0, {**placed, "weights.host": 1.0}), 4)  # 8 tokens in 30 + 13 s
    0.186
    """
    prefill, in_s, step = block_layer_s(work, links, placed)
    whole_s = layers * (max(prefill) + (work.answer_tokens - 1.0) * (in_s + max(step)))
    return float(work.sequences * work.answer_tokens / whole_s)


_READ_AHEAD = 0.95
"""Of the disk's rate, what weights get beside caches (``experimental/cost_model.py``)."""
