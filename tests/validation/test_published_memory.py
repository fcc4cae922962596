"""Peak memory of published runs whose every term is known: what the software holds besides states and activations."""

from pathlib import Path
from statistics import median

import pytest

from planner.validation.plans import run_of
from planner.validation.report import validate
from planner.validation.table import read_table
from planner.validation.training import predicted_run

LARGEST = Path(__file__).parents[2] / "benchmarks" / "held_out" / "training" / "mosaicml_llm_foundry.csv"

NONE = {"offload": "none", "cp": "1", "score_for": "memory", "vpp": "1", "micro_batch": "1"}
LLAMA_8B = {
    "model": "Llama-3.1-8B", "n_layers": "32", "hidden": "4096", "ffn_hidden": "14336", "n_heads": "32", "n_kv_heads": "8",
    "head_dim": "128", "vocab": "128256", "seq_len": "8192", "mlp": "swiglu", "tied_embeddings": "false",
}  # fmt: skip
LLAMA_70B_12_LAYERS = {
    **LLAMA_8B, "model": "llama3-70b trimmed to 12 layers", "n_layers": "12", "hidden": "8192", "ffn_hidden": "28672",
    "n_heads": "64", "seq_len": "4096",
}  # fmt: skip

# SimuMax docs/b200/b200_release_v1.2_summary.json (@4dcaae5): PyTorch's maximum of allocated bytes. Logits and placeholders are
# on the fullest device where pp is 1, placeholders alone where it is 2.
SIMUMAX = {
    **NONE, **LLAMA_70B_12_LAYERS, "accelerator": "B200-SXM", "n_devices": "8", "zero_stage": "1", "recompute": "none",
    "dtype": "bf16", "framework": "Megatron-Core", "measured_date": "2026", "other_flags": "fused cross entropy (cef)",
    "peak_memory_unit": "GiB", "peak_memory_kind": "allocated",
}  # fmt: skip
ALLOCATED = [
    {"tp": "1", "pp": "2", "sequence_parallel": "false", "global_batch": "16", "peak_memory_gb": "66.55"},
    {"tp": "2", "pp": "1", "sequence_parallel": "true", "global_batch": "16", "peak_memory_gb": "60.68"},
    {"tp": "4", "pp": "1", "sequence_parallel": "true", "global_batch": "8", "peak_memory_gb": "39.07"},
    {"tp": "8", "pp": "1", "sequence_parallel": "true", "global_batch": "4", "peak_memory_gb": "28.29"},
]

# bigscience train/tr11-176B-ml/chronicles-prequel.md (@9e64ede), section "fp16", nvidia-smi: one replica, whose update holds fp32
# gradients and a flat copy beside the states (22 bytes per parameter), and two, which hold half of that and buckets.
BLOOM = {
    **NONE, "model": "BLOOM-prequel", "hidden": "14400", "ffn_hidden": "57600", "vocab": "250880", "seq_len": "2048",
    "mlp": "gelu", "tied_embeddings": "true", "accelerator": "A100-SXM-80GB", "devices_per_node": "8", "tp": "8",
    "sequence_parallel": "false", "zero_stage": "1", "global_batch": "2048", "recompute": "full", "dtype": "fp16",
    "framework": "Megatron-DeepSpeed", "measured_date": "2022", "peak_memory_unit": "GB", "peak_memory_kind": "smi",
}  # fmt: skip
PROCESS = [
    {"n_layers": "8", "n_heads": "32", "n_devices": "8", "pp": "1", "peak_memory_gb": "67"},
    {"n_layers": "80", "n_heads": "96", "n_devices": "80", "pp": "10", "peak_memory_gb": "73"},
    {"n_layers": "80", "n_heads": "96", "n_devices": "160", "pp": "10", "peak_memory_gb": "51"},
    {"n_layers": "80", "n_heads": "96", "n_devices": "320", "pp": "10", "peak_memory_gb": "35"},
]

# torchtitan benchmarks/llama3_h100_202412_torchtitan.md (@b5bcd76c6), tables 1 and 3, eager: bytes that PyTorch reserves, which
# keeps what the layers have freed beside the logits of the head.
TORCHTITAN = {
    **NONE, **LLAMA_8B, "accelerator": "H100-HBM2e-96GB", "tp": "1", "pp": "1", "sequence_parallel": "false",
    "zero_stage": "3", "micro_batch": "2", "recompute": "selective:per_op_sac", "dtype": "bf16", "framework": "PyTorch FSDP2",
    "measured_date": "2025", "other_flags": "torch.compile=False", "peak_memory_unit": "GiB", "peak_memory_kind": "reserved",
}  # fmt: skip
RESERVED = [
    {"n_devices": "8", "global_batch": "16", "peak_memory_gb": "82.4"},
    {"n_devices": "128", "global_batch": "256", "peak_memory_gb": "67"},
]


# The same tables, compiled: blocks that keep no result which no backward reads, 16-bit and 8-bit products alike.
COMPILED = [
    {"n_devices": "8", "global_batch": "16", "peak_memory_gb": "77"},
    {"n_devices": "8", "global_batch": "16", "peak_memory_gb": "76.8", "dtype": "fp8_tensorwise"},
    {"n_devices": "128", "global_batch": "256", "peak_memory_gb": "62"},
    {"n_devices": "128", "global_batch": "256", "peak_memory_gb": "61.8", "dtype": "fp8_tensorwise"},
]


@pytest.mark.parametrize(
    ("source", "runs", "most"),
    [
        (SIMUMAX, ALLOCATED, 0.01),
        (BLOOM, PROCESS, 0.06),
        (TORCHTITAN, RESERVED, 0.04),
        ({**TORCHTITAN, "other_flags": "torch.compile=True", "measured_date": "2024-12"}, COMPILED, 0.03),
    ],
    ids=["allocated", "process", "reserved", "compiled"],
)
def test_peak_memory_of_published_runs(table, source, runs, most):
    report = validate([table(*({**source, **run, "row_id": str(at)} for at, run in enumerate(runs)))])
    assert {row.row_id: row.predicted / row.measured for row in report.rows} == {
        str(at): pytest.approx(1.0, abs=most) for at in range(len(runs))
    }


def test_the_largest_micro_batches_that_ran_fit():
    """llm-foundry's benchmarks fill devices of 40 and 80 GB, micro-batch by micro-batch; none of them ran out."""
    full = []
    for row in read_table(LARGEST).rows:
        run, assembly = predicted_run(run_of(row))
        estimate = assembly.plan.estimate
        assert estimate.fits, row.text("row_id")
        full.append(estimate.memory_bytes["peak"] / run.problem.cluster.device.memory_bytes.value)
    assert len(full) == 138
    assert median(full) > 0.6
