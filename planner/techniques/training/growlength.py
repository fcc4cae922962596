"""GrowLength and other curricula: a run trains on short sequences first, on long ones last.

What it does: sums phases of a run, each with its length, its tokens and its best plan; ``planner solve curriculum``.
Saves: attention over long sequences, and the memory and messages that they ask for, while short ones do.
Costs: a change of plan between phases, where one pays; which lengths train as well is the user's to say.
Assumes: as many tokens per step in every phase.
Source: Jin et al. 2023 (GrowLength, arXiv:2310.00576) §3; BERT's two phases: Devlin et al. 2019 (arXiv:1810.04805), appendix A.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from planner.costs.economics import phases_run_s
from planner.technique import Figure, Technique

# BERT-Large on 32 DGX A100: steps, sequences per step, tokens per sequence, sequences per second in mixed precision.
_PHASES = ((7038, 65536, 128, 138294.0), (1563, 32768, 512, 49663.0))


def _hours(subject: Callable[..., Any]) -> float:
    """Hours of both phases."""
    tokens = np.array([steps * batch * length for steps, batch, length, _ in _PHASES], dtype=float)
    rates = np.array([length * rate for *_, length, rate in _PHASES])
    return float(subject(tokens, rates)) / 3600.0


TECHNIQUE = Technique(
    key="growlength",
    name="GrowLength (length curricula)",
    slot=None,
    kind="objective",
    source="arXiv:2310.00576",
    summary="A plan per sequence length, and the time of all phases",
    figures=(
        Figure(
            "hours of BERT-Large's phases of 128 and 512 tokens on 256 A100",
            1.2,
            0.02,
            "NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md (21.11): throughput by length, time to train",
            _hours,
        ),
    ),
    compose=phases_run_s,
)
