"""The column ``other_flags``: launcher flags and plain words, separated by semicolons, as knobs of a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from planner.validation.table import Unsupported

__all__ = ["Flags", "kernel_knobs", "read_flags"]

_ATTENTION = {
    "flash": "flash", "fused": "flash", "auto": "flash", "triton": "flash", "sdpa": "flash",
    "unfused": "eager", "local": "eager", "torch": "eager", "eager": "eager",
}  # fmt: skip
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "muon": "muon", "dist_muon": "muon", "sgd": "sgd"}
_ADAPTERS = {
    "lora-rank": "adapter_rank",
    "lora-dim": "adapter_rank",
    "lora-target-modules": "adapter_targets",
}
# What no technique describes: the word, and how it is called.
_UNSUPPORTED = ((r"(?<![\w-])(qlora|dora)(?![\w-])", "adapters other than plain low-rank ones"),)


@dataclass(frozen=True, slots=True)
class Flags:
    """The column as values by flag (names in lower case with dashes), and as the text that it was."""

    text: str
    values: Mapping[str, str]

    def whole(self, name: str) -> int | None:
        """A flag's whole number; None where it is absent or says something else."""
        value = self.values.get(name, "")
        return int(value) if value.isdecimal() and len(value) < 10 else None

    def says(self, pattern: str) -> bool:
        """Whether the text matches a regular expression, in any case."""
        return re.search(pattern, self.text, re.IGNORECASE) is not None


def read_flags(text: str) -> Flags:
    """Reads the column.

    >>> read_flags("attn_impl=flash (as submitted); async TP").values
    {'attn-impl': 'flash'}
    """
    values = {}
    for part in text.split(";"):
        name, equals, value = part.partition("=")
        if equals:
            values[name.strip().lower().replace("_", "-")] = value.split("(")[0].strip() or value.strip()
    return Flags(text.replace("_", "-"), values)


def kernel_knobs(flags: Flags, *, tp: int, cp: int) -> dict[str, str]:
    """Knobs that the flags set.

    Args:
        flags: the flags.
        tp, cp: degrees; knobs of a degree of 1 are left out.

    Raises:
        Unsupported: a flag asks for what no technique describes.
    """
    for pattern, what in _UNSUPPORTED:
        if flags.says(pattern):
            raise Unsupported(f"{what}: not modelled")
    knobs = {}
    if flags.says(r"(?<![\w-])lora(?![\w-])"):
        knobs["adaptation"] = "lora"
        knobs |= {knob: flags.values[flag] for flag, knob in _ADAPTERS.items() if flag in flags.values}
    attention = flags.values.get("attention-backend") or flags.values.get("attn-impl")
    if attention is None and flags.values.get("transformer-impl") == "local":
        attention = "local"
    if attention is not None:
        knobs["attention_kernel"] = _known(_ATTENTION, attention, "attention backend")
    optimizer = flags.values.get("optimizer")
    if optimizer is not None:
        knobs["optimizer"] = _known(_OPTIMIZERS, optimizer, "optimizer")
    if flags.values.get("fsdp mixed-precision", "").upper() == "PURE":
        knobs["gradient_dtype"] = (
            "bf16"  # Composer: gradients are reduced in the format of the weights in use
        )
    if flags.says(r"cross.entropy.*fus|fused cross.entropy"):
        knobs["loss_kernel"] = "fused"
    if flags.values.get("no-gradient-accumulation-fusion", "").lower() == "true":
        knobs["gradient_accumulation"] = "separate"
    if flags.values.get("torch.compile", "").lower() == "false":
        knobs["elementwise_kernel"] = "eager"
    if tp > 1 and flags.says(r"\basync ?tp\b|tp-comm-overlap=true"):
        knobs["tensor_overlap"] = "chunked"
    knobs |= _cuda_graph(flags)
    if flags.values.get("moe-a2a-overlap", "").lower() == "true" or flags.says(r"\bep overlap on\b"):
        knobs["expert_overlap"] = "combined_1f1b"
        # Megatron-Bridge scripts/performance/utils/overrides.py, v0.5.0: a stream of high priority goes with fused experts.
        knobs["exchange_stream"] = "priority" if knobs.get("cuda_graph") == "full" else "plain"
    if flags.says(r"deepep|hybridep"):
        knobs["dispatch"] = "deepep" if flags.says(r"deepep") else "fused"
    if cp > 1 and flags.says(r"cp comm a2a|cp-comm-type=a2a\b"):
        knobs["context"] = "a2a"
    return knobs


def _cuda_graph(flags: Flags) -> dict[str, str]:
    """What is captured in CUDA graphs, or waited for."""
    if flags.says(r"cuda-launch-blocking=1"):
        return {"cuda_graph": "blocking"}
    how, scope = (
        flags.values.get(name, "none").replace("_", "-") for name in ("cuda-graph-impl", "cuda-graph-scope")
    )
    if how == "none":
        return {}
    if how == "full-iteration" or "full-iteration" in scope:
        return {"cuda_graph": "full"}
    modules = [name for name in ("attn", "router", "mlp") if name in scope]
    return {"cuda_graph": "+".join(modules)} if modules else {}


def _known(table: Mapping[str, str], value: str, what: str) -> str:
    if value.lower() not in table:
        raise Unsupported(f"{what} {value!r}: not modelled")
    return table[value.lower()]
