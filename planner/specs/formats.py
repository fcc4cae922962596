"""Numeric formats of a training run: which dtype weights, activations, products, gradients and states have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True, slots=True)
class Format:
    """One mixed-precision recipe.

    Attributes:
        matmul: dtype of the matrix products of linear layers (attention, router and head stay in ``activation``).
        activation: dtype of activations, weights in use, and what travels between devices.
        gradient: dtype in which gradients are accumulated and reduced.
        master: whether the optimizer keeps fp32 master weights beside the weights in use.
        linear_input_bytes: bytes per element of a linear layer's input kept for its weight gradient.
        block: dimensions that quantised products must be multiples of.
    """

    name: str
    matmul: str
    activation: str
    gradient: str
    master: bool
    linear_input_bytes: float
    block: int = 1

    @property
    def core(self) -> str:
        """Dtype of the products that are never quantised (attention, router, head)."""
        return self.matmul if self.block == 1 else self.activation


# Megatron accumulates bf16 training in fp32 main gradients, fp16 as well (18 bytes per parameter with Adam); the
# 16-byte convention of ZeRO (fp16 gradients) is the knob gradient_dtype=bf16.
FORMATS: Mapping[str, Format] = {
    "fp32": Format("fp32", "fp32", "fp32", "fp32", master=False, linear_input_bytes=4.0),
    "tf32": Format("tf32", "tf32", "fp32", "fp32", master=False, linear_input_bytes=4.0),
    "fp16": Format("fp16", "fp16", "fp16", "fp32", master=True, linear_input_bytes=2.0),
    "bf16": Format("bf16", "bf16", "bf16", "fp32", master=True, linear_input_bytes=2.0),
    "fp8": Format("fp8", "fp8", "bf16", "fp32", master=True, linear_input_bytes=1.0, block=16),
    "mxfp8": Format("mxfp8", "fp8", "bf16", "fp32", master=True, linear_input_bytes=1.0 + 1.0 / 32, block=32),
    "nvfp4": Format("nvfp4", "fp4", "bf16", "fp32", master=True, linear_input_bytes=0.5 + 1.0 / 16, block=16),
}
