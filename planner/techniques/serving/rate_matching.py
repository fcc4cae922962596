"""Rate matching: as many replicas of prompts as keep the replicas that generate busy, and no more.

What it does: of two pools, finds the numbers of replicas that answer most on given devices, a rate with the fewest, or
    that answer most per device; on devices of several types by an integer program (``planner.serving.numbers``, ``matching``).
Saves: devices of the pool that would wait for the other.
Costs: nothing; what is left over of whole replicas idles.
Assumes: either pool alone has a highest rate within its limits; requests are spread evenly over a pool's replicas.
Source: Zhong et al. 2024 (DistServe, OSDI) §1 and §4; NVIDIA AIConfigurator, which takes 0.9 and 0.92 of the pools' rates.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.serving import replicas_needed
from planner.technique import Figure, Knob, Technique


def _rate_per_device(subject: Callable[..., float]) -> float:
    """Requests per second and device: replicas of 5.6 prompts/s beside one that generates for 10 requests/s."""
    return 10.0 / (float(subject(10.0, 5.6)) + 1.0)


TECHNIQUE = Technique(
    key="rate_matching",
    name="P:D rate matching (aiconfigurator)",
    slot=None,
    job="serving",
    source="OSDI 2024",
    summary="Numbers of replicas of two pools, exact",
    knobs=(Knob("replicas", "of a pool; the other follows"),),
    figures=(
        Figure(
            "requests per second and device: one that generates for 10/s beside as many of 5.6 prompts/s as it needs",
            3.3,
            0.02,
            "Zhong et al. 2024 (DistServe, OSDI), section 1 and figure 1: two for prompts and one for generation, 3.3 per GPU",
            _rate_per_device,
            second_hand=True,
        ),
    ),
    compose=replicas_needed,
)
