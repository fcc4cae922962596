"""Bytes of number formats, block scales included.

A format stores ``bits`` per element and a scale per block of elements, sometimes a scale of scales. All
constants are part of a format's definition. Sources: OCP Microscaling Formats (MX) Specification v1.0, 2023
(blocks of 32, 8-bit scale); NVFP4: NVIDIA Transformer Engine documentation (blocks of 16, FP8 scale); 1×128
and 128×128 FP8 blocks with FP32 scales: DeepSeek-V3, arXiv:2412.19437, section 3.3.2; NF4: QLoRA,
arXiv:2305.14314, section 3 (blocks of 64, FP32 scales that double quantisation stores in 8 bits with one FP32
per 256).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from planner.costs.arrays import Real

__all__ = ["FORMAT_BITS", "block_bits", "cast_bytes", "dtype_bytes"]


def block_bits(
    element_bits: Real,
    scale_bits: Real,
    block: Real,
    scale_of_scales_bits: Real = 0.0,
    super_block: Real = 1.0,
) -> Real:
    """Bits per element with scales: ``q + s/g``, and ``s₂/(g·g₂)`` more where the scales have a scale.

    ``block`` counts the elements under one scale, ``super_block`` the scales under one scale of scales. A
    zero point counts as part of ``scale_bits``.

    >>> block_bits(4, 8, 16)  # NVFP4
    4.5
    >>> round(block_bits(4, 8, 64, 32, 256), 3)  # double quantised NF4: 0.127 bits (QLoRA, section 3)
    4.127
    """
    return element_bits + (1.0 * scale_bits + scale_of_scales_bits / super_block) / block


FORMAT_BITS: Mapping[str, float] = MappingProxyType(
    {
        "fp64": 64.0,
        "fp32": 32.0,
        "tf32": 32.0,  # stored as fp32
        "bf16": 16.0,
        "fp16": 16.0,
        "fp8": 8.0,
        "int8": 8.0,
        "fp6": 6.0,
        "fp4": 4.0,
        "int4": 4.0,
        "fp8_block": float(block_bits(8, 32, 128)),
        "fp8_block2d": float(block_bits(8, 32, 128 * 128)),
        "mxfp8": float(block_bits(8, 8, 32)),
        "mxfp6": float(block_bits(6, 8, 32)),
        "mxfp4": float(block_bits(4, 8, 32)),
        "nvfp4": float(block_bits(4, 8, 16)),
        "int4_g128": float(block_bits(4, 16, 128)),  # symmetric, one FP16 scale per 128 weights
        "q6_k": 6.5625,  # llama.cpp, ggml-common.h: 210 bytes per 256 weights
        "q4_k_m": 4.8,  # Q4_K's 144 bytes per 256, and Q6_K for half of the values' and the second networks' projections (Llama)
        "sparse24": 9.0,  # two 16-bit values of every four, and 2 bits each that say where they stand
        "nf4": float(block_bits(4, 32, 64)),
        "nf4_double": float(block_bits(4, 8, 64, 32, 256)),
    }
)
"""Bits per stored element of every format that the planner knows."""


def dtype_bytes(dtype: str) -> float:
    """Bytes per element of a format, its scales included.

    Raises:
        ValueError: no such format.

    >>> dtype_bytes("bf16"), dtype_bytes("mxfp8")
    (2.0, 1.03125)
    """
    try:
        return FORMAT_BITS[dtype] / 8.0
    except KeyError:
        raise ValueError(f"{dtype!r} is no number format; known: {', '.join(FORMAT_BITS)}") from None


def cast_bytes(elements: Real, from_bytes: Real, to_bytes: Real, copies: Real = 1.0) -> Real:
    """Bytes of memory traffic to quantise a tensor: read once, write ``copies`` times.

    FP8 recipes write two, one per direction of blocks, because the transpose of a quantised tensor is no
    quantisation of the transpose.

    >>> cast_bytes(1e6, 2.0, dtype_bytes("mxfp8"), copies=2)
    4062500.0
    """
    return 1.0 * elements * (from_bytes + copies * to_bytes)
