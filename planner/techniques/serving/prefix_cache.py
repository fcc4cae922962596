"""Prefix caching: keys and values of a prompt's beginning that an earlier request left are read, not computed again.

What it does: a given share of prompt tokens (``--prefix-hit``) is not computed; the rest attends to them as to any others.
Saves: products of the tokens that hit, and most of the time to the first token.
Costs: caches that are kept for later requests, of the room that is left.
Assumes: the share is measured, never predicted; every request holds its whole context in its cache, shared or not; a pool of
    prompts hands over whole caches.
Source: Zheng et al. 2024 (SGLang, arXiv:2312.07104) §3; vLLM ``--enable-prefix-caching``.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.specs.traffic import Traffic
from planner.technique import Figure, Knob, Technique


def computed_tokens(prompt_tokens: int, hit: float) -> float:
    """Tokens of a prompt that are computed where a share of them is in the cache."""
    return Traffic(prompt_tokens, 1, prefix_hit=hit).computed_isl


def _node_tokens(subject: Callable[..., float]) -> float:
    """Prompt tokens that a node of DeepSeek's service computes in a second, of 73.7 thousand with 56.3 % hits."""
    return float(subject(73_700, 0.563))


TECHNIQUE = Technique(
    key="prefix_cache",
    name="Automatic prefix caching / RadixAttention",
    slot=None,
    job="serving",
    source="arXiv:2312.07104",
    summary="Prompt tokens that hit are read, not computed; their share is given",
    knobs=(Knob("prefix_hit", "fraction of prompt tokens in the cache, measured"),),
    figures=(
        Figure(
            "prompt tokens per second that a node of DeepSeek's service computes, of 73.7 thousand with 56.3 % hits",
            32_206.0,
            1e-3,
            "SGLang team 2025, lmsys.org/blog/2025-05-05-large-scale-ep: DeepSeek Blog (excl. cache hit)",
            _node_tokens,
        ),
    ),
    compose=computed_tokens,
)
