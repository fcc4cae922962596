"""Speculative decoding: a smaller model drafts some tokens, the model checks them all in one step.

What it does: an iteration passes several tokens per generating sequence through the model, behind as many steps of the draft; a
    sequence gains the drafted tokens that are accepted, and one.
Saves: reads of weights and caches, which a step's tokens share.
Costs: the draft's steps, weights and cache; work on tokens that are refused, which larger batches do not hide.
Assumes: tokens are accepted independently, with a probability that was measured; the draft reads the prompts too.
Source: Leviathan et al. 2023 (ICML, arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.speculation import speculation_gain
from planner.technique import Figure, Knob, Technique


def _gain(subject: Callable[..., float]) -> float:
    """How much faster a sequence is answered with a draft that costs nothing."""
    return float(subject(0.8, 5, 0.0))


TECHNIQUE = Technique(
    key="spec_decode",
    name="Speculative decoding (draft model)",
    slot=None,
    job="serving",
    source="ICML 2023",
    summary="A smaller model drafts, the model checks several tokens a step",
    knobs=(Knob("draft", "who drafts"), Knob("draft_tokens", "tokens that are drafted per step")),
    figures=(
        Figure(
            "speed with acceptance 0.8 and 5 drafted tokens, relative to none",
            3.69,
            2e-3,
            "Leviathan et al. 2023 (arXiv:2211.17192), Table 1: alpha = 0.8, gamma = 5, c = 0",
            _gain,
        ),
    ),
    compose=speculation_gain,
)
