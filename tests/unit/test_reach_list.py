"""Every modelled technique of training is reached: a search chooses it, it wins when it is named, or a reason says why neither.

``CASES`` here are choices that only a plan that names them has (``asked``): each is held against the job without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from planner import search
from planner.errors import Infeasible
from planner.technique import discover
from tests.unit.test_reach import CASES as CHOSEN
from tests.unit.test_reach import ON_DEVICE, SLOW, Case, K
from tests.unit.test_schedule_reach import CASES as SCHEDULES


@dataclass(frozen=True)
class Asked:
    """A choice that is named, and another of its slot that is slower on the same problem, or does not fit (``fits`` false)."""

    choice: str
    other: str
    case: Case
    more: dict[str, Any] = field(default_factory=dict)
    fits: bool = True


FLAT = {**K, "tp": 1, "pp": 1, "cp": 1}
TP8 = {**K, **ON_DEVICE, "tp": 8}
EAGER = {**TP8, "attention_kernel": "eager", "sequence_parallel": "true", "micro_batch_size": 1}


def on(model: str, cluster: str, batch: int, seq: int, fixed: dict[str, Any], **options: Any) -> Case:
    return Case("", "", model, cluster, batch, seq, fixed, **options)


CASES = [
    # 7B in one 24 GB card: frozen weights without gradients and states (arXiv:1902.00751, 2205.05638, 2106.09685, 2101.00190).
    *(
        Asked(f"adaptation={kind}", "none", on("llama-7b", "rtx-3090:1x1", 4, 512, {**K, **ON_DEVICE}), fits=False)
        for kind in ("adapters", "ia3", "lora", "prefix")
    ),
    # The host sets the pace of a small model.
    Asked("cuda_graph=full", "none", on("gpt2", "h100-sxm:1x1", 4, 512, K)),
    # Tokens of 16 expert ranks between nodes: arXiv:2412.19437, section 3.2.1.
    Asked("expert_overlap=combined_1f1b", "none",
          on("deepseek-v2-lite", "h100-sxm:2x8", 256, 4096, {**K, "ep": 16, "tp": 1, "cp": 1})),
    Asked("compression=float8", "none", on("llama3-8b", "h100-sxm:4x8", 128, 4096,
          {**FLAT, "zero_stage": "fsdp", "precision": "fp8"}, job={"precisions": ("fp8",)})),
    # A vocabulary of 256,000, and a loss over a fifth of the positions: arXiv:2502.05177.
    Asked("loss_kernel=masked", "fused",
          on("gemma2-9b", "a100-sxm-80gb:1x8", 64, 8192, {"gradient_accumulation": "fused", "tp": 1}), {"target_percent": 20}),
    # The same vocabulary in half of the bytes: FlashAttention's flash_attn/losses/cross_entropy.py.
    Asked("loss_kernel=fused_16bit", "fused",
          on("gemma2-9b", "a100-sxm-80gb:1x8", 64, 8192, {"gradient_accumulation": "fused", "tp": 1})),
    # 13B in one 24 GB card, half of the layers on the host: arXiv:2410.08791.
    Asked("parameter_offload=window", "none", on("gpt3-13b", "rtx-4090:1x1", 1, 512, {"gradient_dtype": "fp16", **K},
          job={"precisions": ("fp16",), "optimizer": "lomo"}, host_gb=256), {"resident_layers": 20}, fits=False),
    Asked("zero_group=ranks", "full", on("gpt3-2.7b", SLOW, 32, 2048, {**FLAT, "zero_stage": 3}), {"zero_group_ranks": 8}),
    Asked("checkpoint_end=early_stop", "whole",
          on("llama3-8b", "a100-sxm-40gb:1x8", 8, 32768, {**TP8, "recompute": "full"})),
    # Scores that exceed memory: arXiv:2205.05198, section 5; less to run again than all of a layer.
    Asked("recompute=modules", "none", on("gpt3-13b", "a100-sxm-80gb:1x8", 32, 8192, EAGER),
          {"recompute_modules": "core_attn"}, fits=False),
    Asked("recompute=per_op", "full", on("llama3-8b", "a100-sxm-80gb:1x8", 8, 65536, TP8)),
    # Sums without sequence parallelism over PCIe: arXiv:2205.05198, section 4.2.2.
    Asked("tensor_overlap=weight_gradient", "none",
          on("gpt3-2.7b", "a6000:1x8", 32, 2048, {**K, **ON_DEVICE, "tp": 8, "sequence_parallel": "false"})),
    # Experts as unlike as 1/j, and as many tokens for every rank: arXiv:2505.21411.
    Asked("expert=grouped", "folded", on("mixtral-8x7b", "h100-sxm:1x8", 64, 4096,
          {**K, "ep": 2, "cp": 1, "tp": 2, "pp": 2, "sequence_parallel": "true"}, job={"expert_zipf": 1.0})),
]  # fmt: skip

SLOWER = "some software works so; the usual choice is never slower"
REASONS = {
    "cast_norms": SLOWER,
    "eager_attention": SLOWER,
    "eager_cross_entropy": SLOWER,
    "eager_elementwise": SLOWER,
    "eager_experts": SLOWER,
    "launch_blocking": SLOWER,
    "log_softmax": SLOWER,
    "placeholder_gradients": SLOWER,
    "separate_accumulation": SLOWER,
    "torch_ring": SLOWER,
}
"""What no search chooses and why."""


@pytest.mark.parametrize("asked", CASES, ids=[asked.choice for asked in CASES])
def test_what_is_named_wins_over_the_job_without_it(asked: Asked) -> None:
    slot, choice = asked.choice.split("=")
    case = asked.case

    def step_s(fixed: dict[str, Any]) -> float:
        problem = Case(
            **{name: getattr(case, name) for name in Case.__dataclass_fields__} | {"fixed": fixed}
        ).problem()
        return search(problem, top=1).best.estimate.step_time_s

    named_s = step_s({**case.fixed, slot: choice, **asked.more})
    other = {**case.fixed, slot: asked.other}
    if asked.fits:
        assert named_s < step_s(other)
    else:
        with pytest.raises(Infeasible):
            step_s(other)


def test_every_technique_is_reached_or_has_a_reason() -> None:
    reached = {case.choice for case in CHOSEN} | {asked.choice for asked in CASES}
    reached |= {f"schedule={case.schedule}" for case in SCHEDULES}
    left = {
        technique.key
        for technique in discover("training").values()
        if technique.slot and not any(f"{technique.slot}={choice}" in reached for choice in technique.choices)
    }
    assert left == set(REASONS)


def test_what_fills_no_slot_is_reached_by_its_kind() -> None:
    """Presets are searched in test_presets; a solver's figure is one that the answer without it misses (tests/paper)."""
    for technique in discover("training").values():
        if technique.slot is None:
            reached = {
                "preset": bool(technique.fixes),
                "solver": technique.solve is not None and technique.naive is not None,
                "objective": technique.compose is not None,
                "technique": technique.key == "ring_allreduce",  # chosen message by message
            }
            assert reached[technique.kind], technique.key
