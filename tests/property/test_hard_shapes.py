"""The two shapes that strain the mechanism most go through the same ledger and the same engine as everything else."""

from __future__ import annotations

import numpy as np
import pytest

from planner.engine.block_table import tabulate
from planner.engine.pricer import Pricer
from planner.mesh import Mesh
from planner.operators.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.pipeline.layout import BOUNDARY
from planner.solve.named import examine
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.technique import Context, discover


def test_pipeline_whose_stages_differ() -> None:
    """DeepSeek-V2-Lite in 4 stages: a dense layer and the embedding first, the head last, experts between."""
    problem = Problem(
        load_model("deepseek-v2-lite"), load_cluster("h100-sxm:2x8"), TrainWorkload(64, 4096), load_stack(),
        fixed={"pp": 4, "ep": 4, "pipeline_layout": "short_last"},
    )  # fmt: skip
    assembly = examine(problem)
    layout, memory = assembly.layout, assembly.device_memory
    assert sum(assembly.plan.stages) == 27  # layers of the published config
    assert len(layout.run_first) >= 3, "first, middle and last stages differ"
    peaks = [sum(pools.values()) for pools in memory]
    assert max(peaks) / min(peaks) > 1.05
    assert assembly.plan.estimate.memory_bytes["peak"] == pytest.approx(max(peaks))
    # 1F1B holds p − i micro-batches on stage i (Fan et al. 2021): the first stage's activations exceed the last one's.
    assert memory[0]["activations"] > 2 * memory[-1]["activations"]


def test_decode_iteration_of_a_serving_pool() -> None:
    """One decode iteration of Llama-3.1-8B on one H100: time from the same prices, capacity from the same residents."""
    model, cluster = load_model("llama3.1-8b"), load_cluster("h100-sxm:1x1")
    batch = np.array([1.0, 16.0, 64.0, 256.0])
    context = 4096.0
    one = np.ones_like(batch)
    knobs = {"precision": "bf16", "attention_kernel": "flash"}
    ctx = Context(
        model, cluster, TrainWorkload(1, 4096), load_stack(), Mesh(one, one, one, one, one, one), batch, knobs
    )
    ledger = baseline(model, batch=batch, seq=1.0, kv_seq=context, training=False)
    for technique in ("mixed_precision", "flash_attention"):
        ledger = discover()[technique].apply(ledger, ctx)
    kinds = (*dict.fromkeys(block_order(model)), EMBEDDING, HEAD, BOUNDARY)
    table = tabulate(ledger, Pricer(cluster, ctx.stack), kinds, len(batch))
    counts = np.array([32.0, 1.0, 1.0, 0.0])  # layers, embedding, head
    iteration_s = counts @ table["forward_s"]
    weights = counts @ table["parameters_bytes"]
    cache = counts @ table["kv_cache_bytes"]

    # 8.03e9 parameters in 2 bytes; 2 (K and V) · 32 layers · 8 KV heads · 128 · 2 bytes = 131,072 bytes per token.
    assert weights[0] == pytest.approx(2 * 8_030_261_248)
    assert cache == pytest.approx(131_072 * context * batch)
    device = cluster.device
    read_s = (weights - 2 * 128_256 * 4096 + cache) / float(
        device.memory_bytes_per_s
    )  # the embedding is looked up
    assert np.all(iteration_s > read_s), "every weight and every cached key is read once"
    assert np.all(iteration_s < 2.5 * read_s), "and a decode iteration does little else"
    assert np.all(np.diff(iteration_s) > 0)
    capacity = (float(device.memory_bytes) - weights[0]) // (cache[0] / batch[0])
    assert capacity == (float(device.memory_bytes) - 2 * 8_030_261_248) // (131_072 * context)
