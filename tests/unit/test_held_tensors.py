"""Tensors that a block holds while its backward is at work or until it, counted by hand."""

import numpy as np
import pytest

from planner.ledger import Resident
from planner.operators.baseline import baseline
from planner.specs.models import load_model

TOKENS = 4096.0


def held(model, *ends):
    """fp32 bytes per token of the residents of the layers whose names end so."""
    ledger = baseline(load_model(model), batch=1.0, seq=TOKENS)
    return {
        item.what: float(np.ravel(ledger.axes[item.size])[0]) * item.bytes_per_element / TOKENS
        for item in ledger.of(Resident)
        if item.what.endswith(ends) and item.block not in ("embedding", "head")
    }


def test_norms_of_queries_and_keys_keep_their_inputs():
    # Qwen3-8B (config.json): 32 query and 8 key heads of 128, normalised before they are rotated.
    assert held("qwen3-8b", "qk_norm_input") == {"attention.qk_norm_input": 4 * (32 + 8) * 128}
    assert held("llama3-8b", "qk_norm_input") == {}


@pytest.mark.parametrize(
    ("model", "gradients"),
    [
        # hidden 4096, gate and up of 14336 each (Llama 3 8B, config.json)
        ("llama3-8b", {"residual.gradient": 4096, "mlp.act_input.gradient": 2 * 14336}),
        # hidden 1600, one matrix of 6400 (GPT-2 XL, config.json)
        ("gpt2-xl", {"residual.gradient": 1600, "mlp.act_input.gradient": 6400}),
        # hidden 4096, two of eight experts of 14336 per token (Mixtral 8x7B, config.json)
        ("mixtral-8x7b", {"residual.gradient": 4096, "moe.act_input.gradient": 2 * 2 * 14336}),
        # hidden 2048, eight of 128 experts of 768 (Qwen3-30B-A3B, config.json): narrower than the hidden state
        (
            "qwen3-30b-a3b",
            {
                "residual.gradient": 2048,
                "moe.fc2_output.gradient": 8 * 2048,
                "moe.fc2_input.gradient": 8 * 768,
            },
        ),
    ],
)
def test_gradients_of_activations_where_a_block_holds_most(model, gradients):
    assert held(model, ".gradient") == {what: 4 * width for what, width in gradients.items()}
