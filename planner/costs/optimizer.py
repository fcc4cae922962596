"""Bytes and FLOP of an optimizer step, by optimizer.

Bytes are per parameter and come on top of the 16-bit weight and its gradient. They are definitions of the
algorithms, kind "datasheet": Adam arXiv:1412.6980; Adafactor arXiv:1804.04235; 8-bit Adam arXiv:2110.02861
(blocks of 2048, one FP32 scale each); Lion arXiv:2302.06675; LAMB arXiv:1904.00962; Muon, K. Jordan et al.,
2024, https://kellerjordan.github.io/posts/muon/; FP8 AdamW arXiv:2310.18313; LOMO arXiv:2306.09782; AdaLomo
arXiv:2310.10195; INT8 Lion arXiv:2310.07147; AdamW on 16-bit weights (LightSeq2) arXiv:2110.05722; MeZO
arXiv:2305.17333
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "FUSED_UPDATES",
    "KNOWN_OPTIMIZERS",
    "muon_flop",
    "muon_overhead",
    "operator_update_bytes",
    "optimizer_state_bytes",
    "optimizer_touched_bytes",
]

KNOWN_OPTIMIZERS: Mapping[str, float] = MappingProxyType(
    {
        "adamw": 2.0,
        "lamb": 2.0,
        "adam8bit": 2.0,
        "sgd": 0.0,
        "sgd_momentum": 1.0,
        "lars": 1.0,
        "lion": 1.0,
        "muon": 1.0,
        # One row and one column of second moments per matrix, 4(r + c)/(rc) bytes: neglected.
        "adafactor": 0.0,
        "adamw_fp8": 2.0,
        "adamw_16bit": 2.0,
        "lion_int8": 1.0,
        "lomo": 0.0,
        "adalomo": 0.0,
        "mezo": 0.0,
    }
)
"""State values per parameter besides the master weight; Muon's is for matrices, vectors use AdamW."""

FUSED_UPDATES = frozenset({"lomo", "adalomo", "mezo"})
"""Optimizers that leave no gradients behind: their update is part of the backward, or they have none."""

# Values read and written per parameter by torch/optim's operators, one after the other (PyTorch 1.13, of AdamW
# _single_tensor_adamw; in place as there): param.mul_ 2, exp_avg.mul_ 2 and .add_ 3, exp_avg_sq.mul_ 2 and .addcmul_ 3, .sqrt 2,
# the division 2 and .add_ 2, param.addcdiv_ 4. SGD: weight decay 3, momentum .mul_ 2 and .add_ 3, param.add_ 3.
_OPERATOR_VALUES = {"adamw": 22.0, "sgd_momentum": 11.0, "sgd": 6.0}

_MOMENT_BYTES = {
    "adam8bit": 1.0 + 4.0 / 2048.0,
    "adamw_fp8": (1.0 + 2.0) / 2.0,  # first moment FP8, second FP16
    "lion_int8": 1.0,
}
_MASTER_BYTES = {
    "adamw_fp8": 2.0,
    "adamw_16bit": 0.0,
    "lion_int8": 0.0,
    "lomo": 0.0,
    "adalomo": 0.0,
    "mezo": 0.0,
}
_FP32_BYTES = 4.0


def optimizer_state_bytes(
    optimizer: str, master_bytes: float | None = None, moment_bytes: float | None = None
) -> float:
    """Bytes of optimizer state per parameter: master weight and moments.

    ``moment_bytes`` is the stored width of a moment (FP32, or 8 bits and its scale for ``adam8bit``, unless
    given); ``master_bytes`` is FP32's unless given, FP16's for ``adamw_fp8``, and 0 where no master copy is kept.

    Raises:
        ValueError: no such optimizer.

    >>> optimizer_state_bytes("adamw"), round(optimizer_state_bytes("adam8bit"), 3)  # K = 12 of ZeRO
    (12.0, 6.004)
    """
    if optimizer not in KNOWN_OPTIMIZERS:
        raise ValueError(f"{optimizer!r} is no optimizer; known: {', '.join(KNOWN_OPTIMIZERS)}")
    width = _MOMENT_BYTES.get(optimizer, _FP32_BYTES) if moment_bytes is None else moment_bytes
    if master_bytes is None:
        master_bytes = _MASTER_BYTES.get(optimizer, _FP32_BYTES)
    return master_bytes + KNOWN_OPTIMIZERS[optimizer] * width


def optimizer_touched_bytes(state_bytes: Real, gradient_bytes: Real = 4.0, weight_bytes: Real = 2.0) -> Real:
    """Bytes of memory traffic per parameter of a fused update: ``2K + g + w``.

    States are read and written, the gradient read, the weight written. Adam: ``2·12 + 4 = 28`` and 2 more for
    the 16-bit copy of the weights.

    >>> optimizer_touched_bytes(optimizer_state_bytes("adamw"))
    30.0
    """
    return 2.0 * state_bytes + gradient_bytes + weight_bytes


def operator_update_bytes(optimizer: str) -> float | None:
    """Bytes of memory traffic per parameter of an update in fp32 by one kernel per tensor operator; None: not known.

    A fused AdamW moves 28 (:func:`optimizer_touched_bytes` without the 16-bit copy).

    >>> operator_update_bytes("adamw")
    88.0
    """
    values = _OPERATOR_VALUES.get(optimizer)
    return None if values is None else _FP32_BYTES * values


def muon_flop(rows: Real, columns: Real, iterations: int = 5) -> Real:
    """FLOP to orthogonalise one momentum matrix by Newton–Schulz: ``iterations·(4m²n + 2m³)``, ``m ≤ n``.

    Per iteration ``A = XXᵀ`` and ``BX`` at ``2m²n`` each, ``A²`` at ``2m³``.

    >>> float(muon_flop(768, 768)) / 768**3
    30.0
    """
    short, long = np.minimum(rows, columns) * 1.0, np.maximum(rows, columns)
    return iterations * (short * short) * (4.0 * long + 2.0 * short)


def muon_overhead(rows: Real, columns: Real, tokens: Real, iterations: int = 5) -> Real:
    """FLOP of :func:`muon_flop` relative to training the matrix on ``T`` tokens, ``6·m·n·T``.

    ``(20m + 10m²/n)/(6T)`` with ``m ≤ n``, which is ``5m/T`` for a square matrix.

    >>> round(float(muon_overhead(768, 768, 524288)) * 100, 2)  # 5 * 768 / 524288
    0.73
    """
    return muon_flop(rows, columns, iterations) / (6.0 * rows * columns * tokens)
