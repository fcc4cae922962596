"""Cost and energy of a token as what a search minimises.

What it does: nothing to the ledger; plans are ranked by tokens per dollar or joule of the devices that they use, at the highest
    load that keeps the limits, and over a day by their device hours.
Saves: devices that answer little for what they cost.
Costs: answers of all machines together, which is what is maximised otherwise.
Assumes: devices are paid by the hour, used or not; they draw their power limit, which bounds the energy from above.
Source: DeepSeek-AI 2025, DeepSeek-V3/R1 Inference System Overview (cost of a day).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.economics import rental_usd
from planner.technique import Figure, Knob, Technique


def _day_usd(subject: Callable[..., float]) -> float:
    """A day of 226.75 nodes of 8 devices on average, at 2 dollars per device and hour."""
    return float(subject(226.75 * 8 * 24, 2.0))


TECHNIQUE = Technique(
    key="energy_carbon_cost",
    name="Energy, carbon, cost per token",
    slot=None,
    job="serving",
    kind="objective",
    source="DeepSeek-V3/R1 Inference System Overview, 2025",
    summary="Least dollars or joules per token; a day's load in device hours",
    knobs=(Knob("objective", "what is maximised", ("throughput", "usd", "energy"), "throughput"),),
    figures=(
        Figure(
            "dollars of a day of DeepSeek's service",
            87072.0,
            1e-6,
            "DeepSeek-AI 2025, DeepSeek-V3/R1 Inference System Overview: 226.75 nodes on average, $87,072 a day",
            _day_usd,
        ),
    ),
    compose=rental_usd,
)
