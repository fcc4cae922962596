"""The 175B plan of the Frontier study: 4 tensor ranks, 16 stages, micro-batches of one, full recomputation, ZeRO 1.

What it does: ``--preset frontier_study`` fixes these; a replica spans 64 graphics compute dies of MI250X.
Saves: as its members.
Costs: as its members.
Assumes: as its members; Megatron-DeepSpeed, which had no sequence parallelism.
Source: Dash et al. 2023 (arXiv:2312.12705), whose abstract has 36.14 % of peak for the 175B model; degrees and the log of a run
    in the authors' repository (github.com/sajal-vt/Megatron-DeepSpeed-ORNL: ``launch_gpt175b_tflops_149.slurm``,
    ``ds_config_16N_175B.json``, ``logs/gpt175b_megatron_16N_newcomm-405287.o``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures

_LAYERS = 96


def _in_flight(fixes: Mapping[str, Any]) -> float:
    """MiB that a device keeps of every micro-batch in flight."""
    chosen = {name: fixes[name] for name in ("tp", "recompute", "sequence_parallel") if name in fixes}
    ledger, _ = figures.recipe(model="gpt3-175b", attention_kernel="flash", **chosen)
    return figures.saved_bytes(ledger) * _LAYERS / float(fixes.get("pp", 1)) / 2**20


TECHNIQUE = Technique(
    key="frontier_study",
    name="Frontier trillion-parameter study",
    slot=None,
    kind="preset",
    source="arXiv:2312.12705",
    summary="175B: tp 4, pp 16, micro-batches of one, full recompute, ZeRO stage 1",
    fixes={
        "tp": 4, "pp": 16, "micro_batch_size": 1, "sequence_parallel": "false", "schedule": "1f1b", "recompute": "full",
        "zero_stage": "1",
    },
    figures=(
        Figure(
            "MiB that one micro-batch in flight takes on a device of the 175B plan",
            300.0,
            0.05,  # what a stage receives is kept too, cut over its tensor ranks: a quarter of a layer's input
            "the authors' log (sajal-vt/Megatron-DeepSpeed-ORNL): peaks of ranks 8, 16, … fall by 300 MiB from stage to stage",
            _in_flight,
        ),
    ),
)  # fmt: skip
