"""A draft head: a layer trained beside the model predicts its next hidden state, and with it the next token.

What it does: as with a smaller model; the draft is a product that joins a token's embedding with the model's last hidden state,
    one dense layer, and the model's own output projection, per token.
Saves: as with a smaller model; its weights beyond a layer, since both ends are the model's.
Costs: the layer, the joining product and an output projection per drafted token, and the layer's cache.
Assumes: one chain of tokens (no trees); acceptance was measured; the layer is like the model's last dense one; heads of the third
    kind, which join hidden states of three layers, take as long.
Source: Li et al. 2024 (EAGLE, arXiv:2401.15077), section 4.1; vLLM ``method: eagle``; SGLang ``--speculative-algorithm EAGLE``.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.speculation import draft_head_parameters
from planner.technique import Figure, Knob, Technique


def _seven_billion(subject: Callable[..., float]) -> float:
    """Billions of parameters of the head of Llama-2 7B: 4h² + 3hf of a layer."""
    return float(subject(4 * 4096**2 + 3 * 4096 * 11008, 4096)) / 1e9


def _seventy_billion(subject: Callable[..., float]) -> float:
    """Billions of parameters of the head of Llama-2 70B, whose layers have 8 key heads of 128."""
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    return float(subject(layer, 8192)) / 1e9


_PAPER = "Li et al. 2024 (arXiv:2401.15077), section 4: trainable parameters 0.24B, 0.37B, 0.56B and 0.99B"
TECHNIQUE = Technique(
    key="eagle",
    name="EAGLE draft heads, in a chain",
    slot=None,
    job="serving",
    source="ICML 2024",
    summary="A layer trained beside the model drafts from its hidden states",
    knobs=(Knob("draft", "who drafts"), Knob("draft_tokens", "tokens that are drafted per step")),
    figures=(
        Figure("billions of parameters of the head of Llama-2 7B", 0.24, 0.03, _PAPER, _seven_billion),
        Figure("billions of parameters of the head of Llama-2 70B", 0.99, 0.01, _PAPER, _seventy_billion),
    ),
    compose=draft_head_parameters,
)
