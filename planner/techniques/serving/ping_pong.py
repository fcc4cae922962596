"""Attention and experts on devices of their own, between which micro-batches go back and forth.

What it does: replicas that generate are attention ranks with caches and expert devices with whole experts; two to four
    micro-batches take turns on either side (``--mode ping_pong``). Prompts run in a pool of their own.
Saves: experts see the tokens of all attention ranks, and either side has as many devices as it takes to keep both busy.
Costs: every token travels twice a layer, which micro-batches hide; experts' products have a micro-batch's rows each.
Assumes: whole experts on a device, even loads; tokens travel over the outermost links; one type of devices; micro-batches of
    equal work. Today's wide expert parallelism in one pool does as well or better on such clusters.
Second hand: the gain of a second micro-batch.
Source: Zhu et al. 2025 (MegaScale-Infer, SIGCOMM, arXiv:2504.02263), sections 4.1 and 7.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.serving import ping_pong_s
from planner.technique import Figure, Knob, Technique


def _second(subject: Callable[..., float]) -> float:
    """How much faster two micro-batches pass 56 layers than one, sides that are balanced."""
    one_s, two_s = (float(subject(1.0, 1.0, 0.1, 56.0, count)) for count in (1.0, 2.0))
    return 2.0 * one_s / two_s if two_s else 0.0


TECHNIQUE = Technique(
    key="encoder_disagg_afd",
    name="Encoder/prefill/decode split (EPD), attention–FFN disaggregation (AFD)",
    slot=None,
    job="serving",
    source="arXiv:2504.02263",
    summary="Attention and experts on devices of their own, micro-batches between them",
    knobs=(Knob("batches_in_turn", "micro-batches that take turns", ("2", "3", "4")),),
    figures=(
        Figure(
            "tokens per second with two micro-batches relative to one, sides in balance",
            1.9,
            0.06,
            "Zhu et al. 2025 (MegaScale-Infer, arXiv:2504.02263), figure 14",
            _second,
            second_hand=True,
        ),
    ),
    compose=ping_pong_s,
)
