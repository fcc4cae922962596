"""Multi-token prediction: modules that the model was trained with draft the next tokens.

What it does: as with a smaller model; the draft is a layer like the last and the model's own output projection, per token.
Saves: as with a smaller model; its weights beyond the layer, which are shared.
Costs: a layer and an output projection per drafted token, and the layer's cache.
Assumes: one module drafts all tokens, in turn; acceptance was measured.
Source: DeepSeek-V3 (arXiv:2412.19437) section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.speculation import accepted_tokens
from planner.technique import Figure, Knob, Technique


def _tokens(subject: Callable[..., float]) -> float:
    """Tokens per step of DeepSeek-V3 with one drafted token, in the middle of the acceptance that it reports (85 to 90 %)."""
    return float(subject(0.875, 1))


TECHNIQUE = Technique(
    key="mtp",
    name="Multi-token prediction heads (DeepSeek MTP, nextn)",
    slot=None,
    job="serving",
    source="arXiv:2412.19437",
    summary="The model's own prediction modules draft",
    knobs=(Knob("draft", "who drafts"), Knob("draft_tokens", "tokens that are drafted per step")),
    figures=(
        Figure(
            "tokens per second of DeepSeek-V3, relative to none: at most the tokens per step",
            1.8,
            0.05,  # the modules' own time is left out
            "Liu et al. 2024 (arXiv:2412.19437), section 5.4.3: acceptance 85 to 90 %, 1.8 times TPS",
            _tokens,
        ),
    ),
    compose=accepted_tokens,
)
