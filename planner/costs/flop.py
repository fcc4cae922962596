"""Parameters and FLOP of GPT-like models, utilisation and time to train.

FLOP count 2 per multiply–add, and attention over the full score matrix: the convention of the papers, not
what a causal kernel computes (for that see ``compute.attention_flop``).

Sources: D. Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", arXiv:2104.04473, equations 2 to 4; V. Korthikanti et al., arXiv:2205.05198, appendix A; J.
Kaplan et al., arXiv:2001.08361, section 2.1.
"""

from __future__ import annotations

from typing import Literal

from planner.costs.arrays import Real

__all__ = [
    "dense_training_flop",
    "gpt_iteration_flop",
    "gpt_parameters",
    "model_flop_utilization",
    "training_s",
]


def gpt_parameters(layers: Real, hidden: Real, vocab: Real, seq: Real) -> Real:
    """Parameters of a GPT model: ``12lh²(1 + 13/(12h) + (V + s)/(12lh))``.

    Learned positions, tied head (Narayanan et al., equation 2).

    >>> round(gpt_parameters(96, 12288, 51200, 2048) / 1e9, 1)  # GPT-3, Table 2
    174.6
    """
    return 12.0 * layers * hidden * hidden + 13.0 * layers * hidden + (1.0 * vocab + seq) * hidden


def gpt_iteration_flop(
    batch: Real,
    seq: Real,
    layers: Real,
    hidden: Real,
    vocab: Real,
    recompute: Literal["none", "selective", "full"] = "none",
) -> Real:
    """FLOP of one iteration on ``batch`` sequences, head included.

    none (model FLOP, for MFU)    ``72·B·s·l·h²(1 + s/(6h) + V/(12lh))``
    full (Narayanan, equation 3)  ``96·B·s·l·h²(1 + s/(6h) + V/(16lh))``
    selective (for HFU)           ``72·B·s·l·h²(1 + s/(3h) + V/(12lh))``

    The selective form is Korthikanti et al.'s hardware FLOP, which counts the recomputed attention as much as
    its forward and backward together; the forward alone adds ``4bs²h`` a layer.

    >>> round(gpt_iteration_flop(2304, 2048, 80, 12288, 51200, "full") / 1e18, 3)  # 145.6B, Table 1
    5.642
    """
    blocks = 1.0 * batch * seq * layers * hidden * hidden
    head = 6.0 * batch * seq * vocab * hidden
    scores = 1.0 * seq / hidden
    if recompute == "full":
        return 96.0 * blocks * (1.0 + scores / 6.0) + head
    return 72.0 * blocks * (1.0 + scores / (3.0 if recompute == "selective" else 6.0)) + head


def dense_training_flop(parameters: Real, tokens: Real) -> Real:
    """Training FLOP by the rule of six: ``6·N·D``. ``parameters`` are those active per token.

    Range: sequences short against ``6h``, no recomputation.

    >>> dense_training_flop(1e12, 20e12)
    1.2e+26
    """
    return 6.0 * parameters * tokens


def model_flop_utilization(flop: Real, step_s: Real, devices: Real, peak_flop_per_s: Real) -> Real:
    """Fraction of peak that a step reaches: ``F/(T·n·X_peak)``; MFU for model FLOP, HFU for hardware FLOP.

    >>> flop = gpt_iteration_flop(64, 2048, 96, 12288, 51200)  # 175B on 64 A100, 13.75 s
    >>> round(model_flop_utilization(flop, 13.75, 64, 312e12), 3)  # arXiv:2205.05198, Table 5: 51.4 %
    0.514
    """
    return flop / (1.0 * step_s * devices * peak_flop_per_s)


def training_s(parameters: Real, tokens: Real, devices: Real, flop_per_s: Real) -> Real:
    """Seconds to train with full recomputation: ``8TP/(nX)`` (Narayanan et al., equation 4).

    ``flop_per_s`` is what each device achieves. Neglects attention and head: 1 to 2.3 % low on the paper's
    Table 2.

    >>> round(training_s(174.6e9, 300e9, 1024, 140e12) / 86400, 1)  # 34 days in section 5.1
    33.8
    """
    return 8.0 * tokens * parameters / (1.0 * devices * flop_per_s)
