"""Keys and values kept in a narrower format than they are computed in.

What it does: the cache holds 8-bit floats; attention widens them, or multiplies in 8 bits.
Saves: half of the cache's bytes: twice as many tokens fit, and generation reads half as much of them.
Costs: a cast when tokens are written, and where queries are wider than keys.
Assumes: one scale per tensor; states of recurrent mixers stay in fp32.
Source: vLLM, "FP8 KV cache" (docs/features/quantization/quantized_kvcache.md); Liu et al. 2024 (KIVI, arXiv:2402.02750).
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident
from planner.technique import Check, Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass


def valid(ctx: ServingContext) -> Iterable[Check]:
    """Only devices with 8-bit rates widen on the fly."""
    device = ctx.cluster.device
    yield Check(f"{device.name} has no fp8 matrix rate", device.supports("fp8"))


def keep(ledger: Ledger, dtype: str) -> Ledger:
    """Gives keys, values and latents of the cache a dtype."""

    def resident(item: Resident) -> Item | None:
        if item.pool != "kv_cache" or item.what == "ssm.state":
            return None
        return item.but(bytes_per_element=dtype_bytes(dtype))

    return ledger.edit(Resident, resident)


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Narrows the cache."""
    return keep(ledger, str(ctx.knobs["cache"]))


def _sixteen(ledger: Ledger, ctx: ServingContext) -> Ledger:
    return keep(ledger, ctx.format.activation)


def _bytes(subject: Pass) -> float:
    """Bytes that a token of Llama-3.1 8B leaves in an 8-bit cache."""
    return runs.cache_bytes_per_token(runs.run("cache", subject, model="llama3.1-8b", cache="fp8"))


def _sixteen_bytes(subject: Pass) -> float:
    """Bytes that a token of DeepSeek-V3 leaves in a 16-bit cache."""
    return runs.cache_bytes_per_token(runs.run("cache", subject, model="deepseek-v3"))


TECHNIQUES = (
    Technique(
        key="sixteen_bit_cache",
        name="16-bit cache",
        slot="cache",
        job="serving",
        choices=("bf16",),
        default=True,
        source="published checkpoints",
        summary="Keys and values as they are computed",
        knobs=(Knob("cache", "number format of keys and values"),),
        figures=(
            Figure(
                "bytes that a token of DeepSeek-V3 leaves in the cache",
                70272.0,
                1e-9,
                "Zhao et al. 2025 (arXiv:2505.09343), Table 1: 70.272 KB per token",
                _sixteen_bytes,
            ),
        ),
        apply=_sixteen,
    ),
    Technique(
        key="kv_quant",
        name="KV-cache quantisation (FP8, INT8, 4-bit, KIVI, TurboQuant)",
        slot="cache",
        job="serving",
        choices=("fp8",),
        source="arXiv:2402.02750",
        summary="An 8-bit cache: twice the tokens, half the traffic",
        knobs=(Knob("cache", "number format of keys and values"),),
        figures=(
            Figure(
                "bytes that a token of Llama-3.1 8B leaves in an 8-bit cache: half of 131,072",
                65536.0,
                1e-9,
                "vLLM, docs/features/quantization/quantized_kvcache.md: FP8 halves the cache of 16 bits",
                _bytes,
            ),
        ),
        valid=valid,
        apply=apply,
    ),
)
