"""Prompt lookup: what followed the last tokens before, in the prompt or the answer, is the draft.

What it does: as with a smaller model, without one.
Saves: the draft's steps, weights and cache.
Costs: an acceptance that depends on how much the answer repeats.
Assumes: looking up takes no time of the device; acceptance was measured.
Source: Leviathan et al. 2023 (ICML, arXiv:2211.17192) section 4.2 (n-grams as drafts); vLLM, method ``ngram``.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.speculation import accepted_tokens
from planner.technique import Figure, Knob, Technique


def _gain(subject: Callable[..., float]) -> float:
    """Tokens per step with a bigram's acceptance and three drafted tokens."""
    return float(subject(0.2, 3))


TECHNIQUE = Technique(
    key="ngram_lookahead",
    name="Prompt lookup / n-gram / Jacobi lookahead",
    slot=None,
    job="serving",
    source="arXiv:2211.17192",
    summary="Earlier text drafts, at no cost",
    knobs=(Knob("draft", "who drafts"), Knob("draft_tokens", "tokens that are drafted per step")),
    figures=(
        Figure(
            "speed with a bigram's acceptance, 0.2, and 3 drafted tokens, relative to none",
            1.25,
            0.01,
            "Leviathan et al. 2023 (arXiv:2211.17192), section 4.2: a bigram model on English to German",
            _gain,
        ),
    ),
    compose=accepted_tokens,
)
