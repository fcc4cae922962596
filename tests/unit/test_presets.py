"""Presets name plans that there are, and the published runs behind two of them are what the engine predicts."""

from __future__ import annotations

import pytest

from planner import Problem, TrainWorkload, examine, load_cluster, load_model, load_stack, search
from planner.technique import discover

PRESETS = {t.key: t for t in discover("training").values() if t.kind == "preset"}
MODELS = {
    "frontier_study": "gpt3-175b",
    "gshard": "mixtral-8x7b",
    "mtnlg_3d": "megatron-529.6b",
    "pangu_ultra_moe": "deepseek-v3",
}
CLUSTERS = {
    "frontier_study": "mi250x:16x8",
    "mtnlg_3d": "a100-sxm-80gb:35x8",
    "pangu_ultra_moe": "h800:64x8",
}


@pytest.mark.parametrize("key", sorted(PRESETS))
def test_a_preset_is_searched_like_any_fixed_choice(key):
    fixed = {knob: str(value) for knob, value in PRESETS[key].fixes.items()}
    problem = Problem(
        load_model(MODELS.get(key, "gpt3-1.3b")), load_cluster(CLUSTERS.get(key, "h100-sxm:4x8")), TrainWorkload(1120, 2048),
        load_stack(), fixed={**fixed, "loss_kernel": "fused", "gradient_accumulation": "fused"},
    )  # fmt: skip
    best = search(problem, top=1).best
    for knob, value in fixed.items():
        assert str({**best.mesh, **best.knobs}[knob]).lower() == value


@pytest.mark.parametrize(
    ("preset", "model", "nodes", "batch", "fixed", "tflops"),
    [
        # Narayanan et al. 2021 (arXiv:2104.04473), Table 1: achieved TFLOP/s per device, full recomputation.
        ("ptdp", "megatron-145.6b", 192, 2304, {"pp": 8, "micro_batch_size": 2, "virtual_stages": 2}, 148),
        (
            "mtnlg_3d",
            "megatron-529.6b",
            280,
            2240,
            {"schedule": "interleaved", "virtual_stages": 3, "micro_batch_size": 1},
            163,
        ),
    ],
)
def test_published_rates_of_presets(preset, model, nodes, batch, fixed, tflops):
    choices = {**PRESETS[preset].fixes, "recompute": "full", **fixed}
    problem = Problem(
        load_model(model), load_cluster(f"a100-sxm-80gb:{nodes}x8"), TrainWorkload(batch, 2048), load_stack("megatron-core"),
        fixed={knob: str(value) for knob, value in choices.items()},
    )  # fmt: skip
    estimate = examine(problem).plan.estimate
    # Their FLOP count recomputation: 96·B·s·l·h²(1 + s/6h + V/16lh) against 72·…(1 + s/6h + V/12lh), 4/3 within 1 %.
    assert estimate.mfu * 312 * 4 / 3 == pytest.approx(tflops, rel=0.15)
