"""Iterations and caches of a serving replica, against arithmetic and published figures."""

from dataclasses import replace

import numpy as np
import pytest

from planner.costs.moe import distinct_experts
from planner.ledger import Matmul
from planner.mesh import Mesh
from planner.serving.capacity import capacity
from planner.serving.composition import Composition, composition_axes
from planner.serving.iteration import Iterations
from planner.specs.device import Sourced
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.technique import ServingContext, discover

DEFAULTS = {t.slot: t.choices[0] for t in discover().values() if t.job == "serving" and t.default}


def iterations(model, cluster="h100-sxm:1x8", stack="vllm", *, tp=1, pp=1, dp=1, ep=1, **knobs):
    degrees = [np.atleast_1d(np.asarray(x, dtype=float)) for x in (tp, 1, dp, pp, ep)]
    tp_, cp_, dp_, pp_, ep_ = np.broadcast_arrays(*degrees)
    mesh = Mesh(tp_, cp_, dp_, pp_, ep_, tp_ * dp_ / ep_)
    ctx = ServingContext(
        load_model(model),
        load_cluster(cluster),
        Traffic(1000, 100),
        load_stack(stack),
        mesh,
        DEFAULTS | knobs,
    )
    return Iterations(ctx)


# -- composition -----------------------------------------------------------------------------------------------------------


def keys(model, block, *, decodes=0.0, context=0.0, prefill=0.0, prefill_context=1.0):
    one = Mesh(*(np.ones(1) for _ in range(6)))
    batch = Composition(
        *(np.array([float(x)]) for x in (decodes, decodes * context, prefill, prefill_context))
    )
    axes = composition_axes(load_model(model), one, batch)
    return {
        name: float(np.ravel(axes[f"{name}@{block}"])[0])
        for name in ("decode_keys", "prefill_keys", "prefill_visible")
    }


@pytest.mark.parametrize(("cached", "chunk"), [(0, 1), (0, 100), (0, 700), (300, 100), (100, 50), (1000, 64)])
def test_windowed_keys_of_a_chunk_are_counted(cached, chunk):
    """Mean over the chunk's tokens of min(position, window), counted one by one; gpt-oss has windows of 128 tokens."""
    model = load_model("gpt-oss-20b")
    block = next(name for name, b in model.blocks.items() if b.attention.window == 128)
    counted = np.mean([min(cached + i + 1, 128) for i in range(chunk)])
    found = keys("gpt-oss-20b", block, prefill=chunk, prefill_context=cached + (chunk + 1) / 2)
    assert found["prefill_keys"] * found["prefill_visible"] == pytest.approx(counted, rel=0.01)


def test_a_generating_sequence_sees_its_context_and_itself_within_the_window():
    model = load_model("gpt-oss-20b")
    by_window = {b.attention.window: name for name, b in model.blocks.items()}
    assert keys("gpt-oss-20b", by_window[None], decodes=4, context=1000)["decode_keys"] == 1001
    assert keys("gpt-oss-20b", by_window[128], decodes=4, context=1000)["decode_keys"] == 128


def test_experts_of_a_batch():
    """Qwen3-30B-A3B, 128 experts of which 8: 128 (1 - (1 - 8/128)^64) = 125.94 are read by 64 tokens, half of them on 2 ranks."""
    model = load_model("qwen3-30b-a3b")
    two = Mesh(*(np.array([x]) for x in (2.0, 1.0, 1.0, 1.0, 2.0, 1.0)))
    batch = Composition(np.array([64.0]), np.array([64000.0]), np.zeros(1), np.zeros(1))
    axes = composition_axes(model, two, batch, expert_load_factor=1.0)
    (block,) = model.blocks
    assert float(distinct_experts(64, 8, 128)) == pytest.approx(125.94, abs=0.01)
    assert float(axes[f"busy_experts@{block}"][0]) == pytest.approx(125.94 / 2, abs=0.01)
    assert float(axes[f"routed_tokens@{block}"][0]) == pytest.approx(64 * 8 / 2)


# -- seconds ---------------------------------------------------------------------------------------------------------------


def test_nothing_takes_no_time_and_rows_are_independent():
    tau = iterations("llama3.1-8b")
    n, m = np.array([0.0, 1.0, 64.0, 64.0]), np.array([0.0, 0.0, 0.0, 2048.0])
    together = tau(n, n * 500, m, (m + 1) / 2)
    assert together[0] == 0.0
    alone = [float(tau(a, a * 500, b, (b + 1) / 2)) for a, b in zip(n, m, strict=True)]
    assert together == pytest.approx(alone, rel=1e-12)
    assert np.all(np.diff(together) > 0)


def test_meshes_are_rows_too():
    both = iterations("llama3.1-70b", tp=[2, 8], weights="fp8")
    batch = Composition(*(np.full(2, x) for x in (32.0, 32000.0, 0.0, 0.0)))
    for index, tp in enumerate((2, 8)):
        alone = iterations("llama3.1-70b", tp=tp, weights="fp8")
        assert float(alone(32.0, 32000.0, 0.0, 0.0)[()]) == pytest.approx(
            both.seconds(batch)[index], rel=1e-12
        )


def test_a_generating_batch_cannot_be_faster_than_its_bytes():
    """Weights and caches once over the data sheet's bandwidth: Llama-3.1 8B in 16 bits on one H100 (3.35 TB/s)."""
    tau = iterations("llama3.1-8b")
    footprint = tau.footprint()
    embedding = 2 * 128256 * 4096  # looked up, not read
    for n, context in ((1, 100), (32, 4000), (256, 2000)):
        n_bytes = (
            float(footprint.weights_bytes[0]) - embedding + n * context * float(footprint.token_bytes[0])
        )
        assert float(tau(n, n * context, 0.0, 0.0)) > n_bytes / 3.35e12


def test_attention_ranks_share_the_work():
    """Eight attention ranks with four sequences each take as long as one with four, hosts included: each schedules its own."""
    one, eight = iterations("llama3.1-8b"), iterations("llama3.1-8b", dp=8)
    alone, together = float(one(4.0, 8000.0, 0.0, 0.0)), float(eight(32.0, 64000.0, 0.0, 0.0))
    assert together == pytest.approx(alone, rel=1e-9)


def test_a_tree_of_stages_passes_every_layer():
    """Four stages of eight layers take as long as thirty-two layers, three hops, and the host of every stage."""
    one, four = iterations("llama3.1-8b"), iterations("llama3.1-8b", pp=4)
    host_s = 3.0 * float(one.host_s(Composition(*(np.array([x]) for x in (8.0, 8000.0, 0.0, 0.0))))[0])
    assert float(four(8.0, 8000.0, 0.0, 0.0)) > float(one(8.0, 8000.0, 0.0, 0.0))
    assert float(four(8.0, 8000.0, 0.0, 0.0)) < 1.2 * float(one(8.0, 8000.0, 0.0, 0.0)) + host_s


# -- bytes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "tokens"), [(1, 66144), (2, 163008), (4, 356736)])
def test_tokens_of_opt_13b_on_80_gb(tp, tokens):
    """DistServe's repository (simdistserve, OPT-13B on an A100 80 GB) lists these capacities: one budget explains all three."""
    footprint = iterations("opt-13b", "a100-sxm-80gb:1x8", tp=tp).footprint()
    held = float(footprint.weights_bytes[0]) + tokens * float(footprint.token_bytes[0])
    assert 79.2e9 < held < 80.2e9


@pytest.mark.parametrize(("batch", "expected_ms"), [(1, 4.98), (8, 12.13), (240, 249.09)])
def test_step_of_llama_13b_on_eight_v5e(batch, expected_ms):
    """How to Scale Your Model (jax-ml.github.io/scaling-book, inference): bytes over 8 x 819 GB/s, 8192 tokens of context."""
    footprint = iterations("llama2-13b").footprint()
    n_bytes = float(footprint.weights_bytes[0]) + batch * 8192 * float(footprint.token_bytes[0])
    assert n_bytes / (8 * 8.19e11) * 1e3 == pytest.approx(expected_ms, rel=0.005)


def test_latents_and_copied_heads_do_not_shrink_with_tensor_ranks():
    """DeepSeek-V3 leaves 70,272 bytes per token on every rank; 8 key heads on 16 ranks leave 1/8, not 1/16, of the bytes."""
    latent = iterations("deepseek-v3", "h200-sxm:2x8", tp=[1, 8], ep=[1, 1]).footprint()
    assert latent.token_bytes.tolist() == [70272.0, 70272.0]
    copied = iterations("llama3.1-70b", "h200-sxm:2x8", tp=[1, 8, 16]).footprint()
    assert copied.token_bytes.tolist() == [327680.0, 40960.0, 40960.0]


def test_blocks_are_whole_and_windows_end():
    footprint = iterations("gpt-oss-20b").footprint()
    assert set(footprint.window_bytes) == {128}
    assert float(footprint.cache_bytes(1, 16)[0]) == float(footprint.cache_bytes(16, 16)[0])
    long, longer = (float(footprint.cache_bytes(n, 16)[0]) for n in (1024, 2048))
    assert longer - long == pytest.approx(1024 * float(footprint.token_bytes[0]))


def test_states_do_not_grow():
    footprint = iterations("mamba2-2.7b").footprint()
    assert float(footprint.token_bytes[0]) == 0.0
    assert float(footprint.sequence_bytes[0]) > 0.0


def test_capacity_is_what_is_left():
    tau = iterations("llama3.1-8b")
    held = capacity(tau, 1000, 100, np.array([8192.0]))
    software = tau.software
    budget = float(software.memory_fraction) * float(tau.ctx.cluster.device.memory_bytes)
    taken = held.weights_bytes[0] + held.activation_bytes[0] + held.reserved_bytes + held.cache_bytes[0]
    assert taken == pytest.approx(budget)
    # 1,100 tokens are 69 blocks of 16: 1,104 tokens of 131,072 bytes.
    assert held.sequences[0] == min(
        np.floor(held.cache_bytes[0] / (1104 * 131072)), float(software.max_sequences)
    )


def test_every_stage_issues_each_batch():
    """Batches in flight are as many as stages, and each costs a stage's host the same: four times one stage's, of four stages."""
    batch = Composition(*(np.array([x]) for x in (8.0, 8000.0, 0.0, 1.0)))
    one, four = (iterations("llama3.1-8b", pp=pp) for pp in (1, 4))
    device_s = [float(x.seconds(batch)[0] - pp * x.host_s(batch)[0]) for x, pp in ((one, 1), (four, 4))]
    host_s = float(one.software.iteration_s) + 8 * float(one.software.sequence_s)
    assert float(one.host_s(batch)[0]) == pytest.approx(host_s)
    assert device_s[1] > device_s[0]  # the same layers, and three transfers
    assert float(four.seconds(batch)[0]) == pytest.approx(device_s[1] + 4 * host_s)


def test_scales_known_beforehand_cost_no_kernel_of_their_own():
    """Static fp8 scales are applied by the kernel before the product; one finds the scales of blocks, which is fused in part."""
    batch = Composition(*(np.array([x]) for x in (8.0, 8000.0, 0.0, 1.0)))

    def product_s(weights, share):
        each = iterations("llama3.1-8b", stack="trtllm", weights=weights)
        served = replace(each.ctx.stack.serving, call_share=Sourced(share, "assumed", "test"), on={})
        other = Iterations(replace(each.ctx, stack=replace(each.ctx.stack, serving=served, on={})))
        ledger = other.sized(batch)
        (item,) = [i for i in ledger.of(Matmul) if i.what == "mlp.fc1"]
        return float(np.ravel(other.pricer.prices([item], ledger.axes)[0])[0])

    assert product_s("fp8", 1.0) == product_s("fp8", 0.5)
    assert product_s("fp8_block", 1.0) > product_s("fp8_block", 0.5)


@pytest.mark.parametrize(
    ("cluster", "least", "most"), [("a100-sxm-80gb:1x1", 0.4, 0.5), ("rtx-4090:1x1", 0.75, 0.95)]
)
def test_a_part_with_more_memory_than_multiprocessors_is_not_read_in_full(cluster, least, most):
    """Products by vectors in llama.cpp draw 9.1 GB/s per multiprocessor: of A100's 2,039 GB/s, 108 draw 982; RTX 4090's 128, all.

    XiongjieDai/GPU-Benchmarks-on-LLM-Inference, LLaMA 3 8B in F16: 53.5 tokens of 16.06 GB a second, 42 %, and 54.8, 87 %.
    """
    ctx = iterations("llama3-8b", cluster, "llama-cpp", weights="fp16", activations="fp16").ctx
    plain = replace(
        ctx.stack,
        on={},
        matmul_slowdown=Sourced(1.0, "assumed", "test"),
        serving=replace(ctx.stack.serving, on={}),
    )
    each = Iterations(replace(ctx, stack=plain))

    def rate_bytes_per_s(sequences):
        batch = Composition(*(np.array([x]) for x in (sequences, 100.0 * sequences, 0.0, 1.0)))
        ledger = each.sized(batch)
        (item,) = [i for i in ledger.of(Matmul) if i.what == "mlp.fc1"]
        seconds = float(np.ravel(each.pricer.prices([item], ledger.axes)[0])[0])
        return 2 * 4096 * 14336 * 2 / seconds  # two matrices in fp16

    memory = float(ctx.cluster.device.memory_bytes_per_s)
    assert least < rate_bytes_per_s(1.0) / memory < most
    assert rate_bytes_per_s(16.0) > 0.75 * memory  # rows of matrices are another kernel


def test_pruned_weights_save_what_is_read_and_nothing_that_is_multiplied():
    zero, one, many = np.zeros(1), np.ones(1), np.full(1, 8192.0)
    token, prompt = {}, {}
    for weights in ("bf16", "sparse24"):
        found = iterations("llama3.1-70b", stack="serving", tp=8, weights=weights)
        token[weights] = float(found(one, one, zero, zero)[0])
        prompt[weights] = float(found(zero, zero, many, np.full(1, 4096.5))[0])
    # 137 GB of 141 GB are in layers; eight devices read 3.35e12 bytes a second each at most
    saved_s = 7 / 16 * 137e9 / 8 / 3.35e12
    assert saved_s < token["bf16"] - token["sparse24"] < 1.5 * saved_s
    assert prompt["sparse24"] == pytest.approx(prompt["bf16"], rel=0.01)
