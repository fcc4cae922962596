"""Numeric formats: of a training run (weights, activations, products, gradients, states), and of kernels of serving engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["FORMATS", "KERNEL_FORMATS", "Format", "KernelFormat"]


class Format(NamedTuple):
    """One mixed-precision recipe.

    Attributes:
        matmul: dtype of the matrix products of linear layers (attention, router and head stay in ``activation``).
        activation: dtype of activations, weights in use, and what travels between devices.
        gradient: dtype in which gradients are accumulated and reduced.
        master: whether the optimizer keeps fp32 master weights beside the weights in use.
        linear_input_bytes: bytes per element of a linear layer's input kept for its weight gradient.
        block: dimensions that quantised products must be multiples of.
        kernels: what kernel libraries call the format of products, where a stack's kernel for it is not the device's best one.
    """

    name: str
    matmul: str
    activation: str
    gradient: str
    master: bool
    linear_input_bytes: float
    block: int = 1
    kernels: str = ""

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
    # One scale per row of either operand; autograd keeps the 16-bit input, which is quantised again along its other side.
    "fp8_rowwise": Format(
        "fp8_rowwise", "fp8", "bf16", "fp32", master=True, linear_input_bytes=2.0, block=16, kernels="fp8"
    ),
    "mxfp8": Format("mxfp8", "fp8", "bf16", "fp32", master=True, linear_input_bytes=1.0 + 1.0 / 32, block=32),
    "nvfp4": Format("nvfp4", "fp4", "bf16", "fp32", master=True, linear_input_bytes=0.5 + 1.0 / 16, block=16),
}


class KernelFormat(NamedTuple):
    """A number format as kernel libraries name it: what is multiplied, and how input and weights are stored."""

    dtype: str
    inputs: str
    weights: str


KERNEL_FORMATS: Mapping[str, KernelFormat] = {
    "bfloat16": KernelFormat("bf16", "bf16", "bf16"),
    "bf16": KernelFormat("bf16", "bf16", "bf16"),
    "float16": KernelFormat("fp16", "fp16", "fp16"),
    "fp16": KernelFormat("fp16", "fp16", "fp16"),
    "half": KernelFormat("fp16", "fp16", "fp16"),
    "float32": KernelFormat("fp32", "fp32", "fp32"),
    "float": KernelFormat("fp32", "fp32", "fp32"),
    "fp32": KernelFormat("fp32", "fp32", "fp32"),
    "fp8": KernelFormat("fp8", "fp8", "fp8"),
    "fp8_block": KernelFormat("fp8", "fp8_block", "fp8_block2d"),
    "mxfp8": KernelFormat("fp8", "mxfp8", "mxfp8"),
    "nvfp4": KernelFormat("fp4", "nvfp4", "nvfp4"),
    "int8": KernelFormat("int8", "int8", "int8"),
    "sq": KernelFormat("int8", "int8", "int8"),
    "int8_wo": KernelFormat("bf16", "bf16", "int8"),
    "int4_wo": KernelFormat("bf16", "bf16", "int4_g128"),
    "sparse24": KernelFormat("bf16", "bf16", "sparse24"),
    "q4_k_m": KernelFormat("fp16", "fp16", "q4_k_m"),
    "q6_k": KernelFormat("fp16", "fp16", "q6_k"),
    "w4a16_mxfp4": KernelFormat("bf16", "bf16", "mxfp4"),
    "w4a8_mxfp4_mxfp8": KernelFormat("fp8", "mxfp8", "mxfp4"),
    "w4a8_mxfp4_fp8": KernelFormat("fp8", "fp8", "mxfp4"),
    "w4afp8": KernelFormat("fp8", "fp8", "int4_g128"),
}
