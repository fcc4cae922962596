"""Carries the rates of a generation to its parts with another power limit than the measured one's.

A matrix product runs at the clock that the power limit leaves it. A generation's file names the energy that the measured part may
spend per 16-bit operation at peak (its limit over its dense rate); a part that may spend r times as much sustains r^exponent of
the measured part's fraction of peak, and no more than a chip that is not throttled (``matmul_burst``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from planner.specs.device import Device, Sourced

__all__ = ["with_power_limit"]

_FORMATS = (
    ("matmul", 16, ("bf16", "fp16")),
    ("matmul_8bit", 8, ("fp8", "int8")),
    ("matmul_4bit", 4, ("fp4",)),
)
_ATTENTION = ("attention", "attention_8bit", "attention_backward")
_ALIKE = 0.02  # data sheets round


def with_power_limit(
    device: Device, joules_per_flop: float, exponent: float, own: Collection[str] = ()
) -> Device:
    """The device with the fractions of peak that its power limit leaves it, as assumed ones.

    Energy per operation is taken to be proportional to the operands' bits. Attention draws no more than products do: a lower
    limit slows it, a higher one does not make it faster.

    Args:
        device: with its generation's fractions.
        joules_per_flop: power limit over dense 16-bit rate of the part that they were measured on.
        exponent: of the sustained rate in the power limit.
        own: constants that the device's own file states; they stay.
    """
    shares = _shares(device, joules_per_flop, exponent)
    shares |= dict.fromkeys(_ATTENTION, min(1.0, shares["matmul"]))
    changed = {
        name: Sourced(float(getattr(device.efficiency, name)) * share, "assumed", "power-limit")
        for name, share in shares.items()
        if name not in own and abs(share - 1.0) > _ALIKE
    }
    if (
        "matmul" in changed and "matmul_burst" not in own
    ):  # a chip that is not throttled runs as fast as any other
        burst = float(device.efficiency.matmul_burst) / shares["matmul"]
        changed["matmul_burst"] = Sourced(burst, "assumed", "power-limit")
    return replace(device, efficiency=replace(device.efficiency, **changed))


def _shares(device: Device, joules_per_flop: float, exponent: float) -> dict[str, float]:
    """Fraction of peak relative to the measured part's, by constant; a format without a rate goes with the next wider."""
    most = float(device.efficiency.matmul_burst)
    shares: dict[str, float] = {}
    share = 1.0
    for name, bits, dtypes in _FORMATS:
        peak = next((float(device.peak_flop_per_s[d]) for d in dtypes if d in device.peak_flop_per_s), None)
        if peak is not None:
            share = min(most, (float(device.power_w) / peak / (joules_per_flop * bits / 16.0)) ** exponent)
        shares[name] = share
    return shares
