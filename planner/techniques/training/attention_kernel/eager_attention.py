"""Eager attention: scores, softmax, dropout and context as separate kernels, as the baseline ledger has them.

What it does: nothing; it names the baseline, so that it can be chosen.
Saves: nothing.
Costs: 5as²b bytes per layer with dropout, and their traffic.
Assumes: the mask is applied to a full score matrix (no product is skipped).
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §4.1.
"""

from __future__ import annotations

from planner.technique import Technique

TECHNIQUE = Technique(
    key="eager_attention",
    name="Eager attention",
    slot="attention_kernel",
    kind="baseline",
    choices=("eager",),
    searched=False,
    asked=True,
    source="arXiv:2205.05198",
    summary="Attention as separate kernels that materialise the score matrix",
)
