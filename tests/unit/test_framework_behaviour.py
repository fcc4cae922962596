"""What a framework does beside the plan: accumulate in place, wait for launches, leave traffic exposed, stop recomputing early.

Expected values are arithmetic, in the comments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.engine.phases import dispatches
from planner.ledger import Collective, Kernel, Matmul, Resident, Stream
from planner.solve.named import examine
from planner.specs.device import Sourced
from planner.specs.stack import load_stack
from planner.techniques.figures import held_bytes, total_bytes

JOB = planner.TrainWorkload(8, 1024)


def assembly(model="gpt2-xl", cluster="a100-sxm-80gb:1x8", stack="default", job=JOB, constants=None, **fixed):
    known = {name: Sourced(value, "assumed", "planner-defaults") for name, value in (constants or {}).items()}
    problem = planner.Problem(
        planner.load_model(model),
        planner.load_cluster(cluster),
        job,
        replace(load_stack(stack), **known),
        fixed,
    )
    return examine(problem)


@pytest.mark.parametrize(
    ("fixed", "n_bytes"),
    [
        ({"zero_stage": "1", "gradient_dtype": "fp32"}, 8.0),  # read and written in fp32
        ({"zero_stage": "0", "gradient_dtype": "bf16"}, 4.0),
        ({"zero_stage": "1", "gradient_accumulation": "separate"}, None),  # the product's own output
        ({"zero_stage": "fsdp"}, 2.0),  # reduced at once, accumulated by the shard
        ({"zero_stage": "fsdp", "pp": 8}, 8.0),  # one replica: nothing to reduce with
    ],
)
def test_weight_gradients_are_read_and_written_where_they_accumulate(fixed, n_bytes):
    ledger = assembly(**fixed).parts[0].ledger
    widths = {item.out_bytes for item in ledger.of(Matmul, phase="weight")}
    assert {float(ledger.axes[w][0]) if isinstance(w, str) else w for w in widths} == {n_bytes}


@pytest.mark.parametrize(
    ("stack", "precision", "gradient_dtype", "n_bytes"),
    [
        # Megatron-LM v2.6, megatron/optimizer/optimizer.py, per fp16 parameter: gradients are copied to fp32 (2 + 4), unscaled in
        # place (4 + 4), read for their norm (4) and scaled (4 + 4); Adam reads gradient, master and two moments (16) and writes
        # three (12); masters are copied to the weights (4 + 2); the gradients' buffer is zeroed (2).
        ("megatron-eager", "fp16", "fp16", 62.0),
        # bf16 is not scaled; gradients that are accumulated in fp32 need no copy.
        ("megatron-eager", "bf16", "fp32", 4.0 + 8.0 + 28.0 + 2.0),
        ("default", "bf16", "bf16", 2.0 + 4.0 + 26.0 + 2.0),
    ],
)
def test_an_update_moves_what_its_kernels_read_and_write(stack, precision, gradient_dtype, n_bytes):
    one = assembly(stack=stack, precision=precision, gradient_dtype=gradient_dtype, zero_stage="0")
    ledger = one.parts[0].ledger
    moved = sum(
        total_bytes(ledger, [item]) for item in ledger.of(Stream, phase="step") if "update" in item.tags
    )
    weights = sum(
        total_bytes(ledger, [item]) / item.bytes_per_element
        for item in ledger.of(Resident, pool="parameters")
    )
    assert moved / weights == pytest.approx(n_bytes)


def test_dropout_writes_and_reads_its_masks():
    with_dropout = replace(planner.load_model("gpt2-xl"), dropout=True)
    problem = planner.Problem(
        with_dropout,
        planner.load_cluster("a100-sxm-80gb:1x8"),
        JOB,
        load_stack("megatron-eager"),
        {"zero_stage": "0"},
    )
    streams = {(item.what, item.phase): item for item in examine(problem).parts[0].ledger.of(Stream)}
    # Of two bytes: softmax reads and writes, dropout reads, writes, and writes a mask of one byte; backward one pass more.
    assert streams["attention.softmax", "forward"].bytes_per_element == 8.0 + 1.0
    assert streams["attention.softmax", "backward"].bytes_per_element == 10.0 + 1.0
    # Branch and residual read, sum and mask written; backward its gradient is summed once, read, unmasked and written.
    assert streams["mixer.add", "forward"].bytes_per_element == 6.0 + 1.0
    assert streams["mixer.add", "backward"].bytes_per_element == 2.0 + 5.0


def test_a_host_that_waits_pays_for_every_kernel_and_collective():
    constants = {"waited_dispatches": 4.0, "dispatch_s": 5e-6}
    queued, waiting = (
        assembly("llama2-7b", stack="megatron-eager", constants=constants, tp=8, cuda_graph=how)
        for how in ("none", "blocking")
    )
    counts, kinds = waiting.layout.device_counts[0], waiting.table.kinds
    waits = 0.0
    for item in waiting.parts[0].ledger.items:
        if item.phase != "step" and item.block != "boundary" and isinstance(item, Kernel | Collective):
            launches = item.launches if isinstance(item, Kernel) else 1.0
            waits += launches * float(counts[kinds.index(item.block)])
    # 8 micro-batches or fewer, each with all of these waits of 4 x 5 microseconds.
    expected_s = waiting.micro_batches * waits * 20e-6
    added_s = waiting.plan.estimate.step_time_s - queued.plan.estimate.step_time_s
    assert added_s == pytest.approx(
        expected_s, rel=0.05
    )  # a group of one, and items without work, are not waited for


def test_traffic_in_one_bucket_hides_behind_nothing():
    def exposed(track, **constants):
        spends = assembly(constants=constants, zero_stage="1").spends
        mine = [
            s
            for s in spends
            if isinstance(s.share.item, Collective) and s.share.item.track == track and s.alone_s
        ]
        return sum(s.seconds for s in mine) / sum(s.alone_s for s in mine)

    # Uniform buckets (Li et al. 2020): the last of K is never hidden, so that K = 1 hides nothing.
    for track in ("weights", "gradients"):
        assert exposed(track, gradient_bucket_bytes=1e12) == pytest.approx(1.0)
    assert exposed("weights", weight_bucket_bytes=1e12) == pytest.approx(1.0)
    assert exposed("gradients", weight_bucket_bytes=1e12) < 0.9


def test_recomputation_stops_early_under_pytorch_only_where_the_network_ends_the_block():
    # One product of 4h² of a block's 12h² (and the addition behind it) is not run again; Gemma 2 has norms behind its network.
    for model, left_out in (("gpt2-xl", True), ("gemma2-9b", False)):
        again = (
            assembly(model, recompute="full", checkpoint_end="early_stop")
            .parts[0]
            .ledger.of(Kernel, phase="recompute")
        )
        assert ("mlp.fc2" not in {item.what for item in again}) is left_out


@pytest.mark.parametrize(
    ("kernels", "precision", "kept"),
    [
        # Llama-3 8B per token: input 4096, queries 4096, values 1024, attention's output 4096, gate 14336, log-sum-exp 2·32.
        # Saved tensors of a block under PyTorch 2.13's torch.compile (aot_eager_decomp_partition), with torchtitan's policy.
        ("fused", "bf16", 2 * (4096 + 4096 + 1024 + 4096 + 14336 + 2 * 32)),
        ("fused", "fp8", 2 * (4096 + 4096 + 1024 + 4096 + 14336 + 2 * 32)),  # the cast runs again
        ("eager", "bf16", 2 * (4096 + 4096 + 1024 + 4096 + 14336 + 2 * 32 + 4096)),  # and the output
    ],
)
def test_a_compiled_block_keeps_no_product_that_no_backward_reads(kernels, precision, kept):
    job = planner.TrainWorkload(8, 8192, precisions=(precision,))
    built = assembly(
        "llama3-8b", "h100:1x8", "pytorch-fsdp", job, precision=precision, elementwise_kernel=kernels, zero_stage="fsdp",
        recompute="per_op",
    )  # fmt: skip
    ledger = built.parts[0].ledger
    saved = [i for i in ledger.of(Resident, block="dense", lifetime="micro_batch") if "saved" in i.tags]
    assert total_bytes(ledger, saved) / 8192 == pytest.approx(kept)


def test_owners_of_whole_tensors_broadcast_them_one_after_the_other():
    """InternLM's hybrid_zero_optim.py: as many calls as ranks that own a tensor, and none hides behind the next forward.

    Llama-3 8B has 32 layers of five matrices (queries, keys and values in one) and two norms, and three tensors beside them.
    """
    for ranks, group, calls in ((16, "full", 16), (16, "node", 8), (1024, "full", 227)):
        built = assembly(
            "llama3-8b", f"a100-sxm-80gb:{ranks // 8}x8", "internlm", planner.TrainWorkload(ranks, 2048), zero_group=group
        )  # fmt: skip
        ledger = built.parts[0].ledger
        sends = [item for item in ledger.of(Collective, phase="step") if item.kind == "broadcast"]
        assert {item.track for item in sends} == {"main"}
        layers = {"dense": 32, "embedding": 1, "head": 1}
        found = sum(layers[item.block] * float(ledger.axes[item.messages][0]) for item in sends)
        assert found == pytest.approx(calls, rel=1e-6)
        sent = sum(layers[item.block] * float(ledger.axes[item.size][0]) for item in sends)
        assert sent == pytest.approx(8_030_261_248, rel=1e-6)


def test_no_owner_of_whole_tensors_has_less_than_the_largest():
    # Llama-3 8B: 8,030,261,248 weights, of which 128,256 · 4,096 in the embedding and as many in the head. On 8 ranks an equal
    # part is more; on 1,024 the embedding's owner updates 15.3 times less than all, and others wait.
    for ranks, parts in ((8, 8.0), (1024, 8_030_261_248 / (128_256 * 4096))):
        built = assembly(
            "llama3-8b", f"a100-sxm-80gb:{ranks // 8}x8", "internlm", planner.TrainWorkload(ranks, 2048)
        )
        assert np.ravel(built.parts[0].ledger.axes["zero_dense"])[0] == pytest.approx(parts)


def test_an_update_by_operators_moves_three_times_the_bytes():
    # torch.optim.AdamW of PyTorch 1.13 without foreach: 22 values of fp32 read or written per parameter; InternLM copies
    # 16-bit gradients to fp32 and zeroes them (8), and reads new masters again (4) to write 16 bits (2). Fused: 28 + 14.
    job = planner.TrainWorkload(8, 2048)
    ledger = assembly("llama3-8b", "a100-sxm-80gb:1x8", "internlm", job).parts[0].ledger
    moved = {item.block: item.bytes_per_element for item in ledger.of(Stream, what="dense_update")}
    assert moved == dict.fromkeys(("dense", "embedding", "head"), 88.0 + 8.0 + 4.0 + 2.0)


def test_metrics_of_every_micro_batch_are_two_more_losses():
    # Composer: for each of two metrics bf16 logits are read and written as fp32, read, and written as log-softmax: 14 bytes.
    # Beside the logits are then both fp32 copies: 10.
    ledger = assembly("gpt2-xl", "a100-sxm-80gb:1x8", "composer", zero_stage="fsdp").parts[0].ledger
    (moved,) = ledger.of(Stream, what="head.metrics")
    (held,) = ledger.of(Resident, what="head.metrics")
    assert (moved.phase, moved.bytes_per_element) == ("backward", 28.0)
    assert (held.lifetime, held.bytes_per_element) == ("step", 10.0)
    assert ledger.axes[moved.size] == ledger.axes[held.size]
    assert (
        not assembly("gpt2-xl", "a100-sxm-80gb:1x8", "pytorch-fsdp")
        .parts[0]
        .ledger.of(Stream, what="head.metrics")
    )


def test_a_ring_is_filled_anew_for_every_owner():
    """Over a thousand ranks: as many bytes as one gather of slices, but hops for every call."""
    job = planner.TrainWorkload(1024, 2048)
    slices, tensors = (
        assembly("llama3-8b", "a100-sxm-80gb:128x8", name, job, gradient_dtype="bf16").plan.estimate
        for name in ("default", "internlm")
    )
    few = [
        assembly("llama3-8b", "a100-sxm-80gb:2x8", name, planner.TrainWorkload(16, 2048), gradient_dtype="bf16").plan.estimate
        for name in ("default", "internlm")
    ]  # fmt: skip
    many = tensors.breakdown_s["data_parallel"] - slices.breakdown_s["data_parallel"]
    assert many > 1.5 * (few[1].breakdown_s["data_parallel"] - few[0].breakdown_s["data_parallel"])


def test_rows_scaled_apart_cost_pytorch_what_torchtitan_measured():
    # torchtitan commit 7a04053: Llama 3 8B on 8 H100 at 8192 tokens, torch.compile: 7186 tokens/s with a scale per tensor and
    # float8 gathers, 6424 with one per row. Neither is in the tables that constants are fitted to.
    tensorwise, rowwise = (
        assembly(
            "llama3-8b", "h100-hbm2e-96gb:1x8", "pytorch-fsdp", planner.TrainWorkload(8, 8192, precisions=(format,)),
            precision=format, zero_stage="fsdp", recompute="per_op",
        ).plan.estimate.tokens_per_s_per_device
        for format in ("fp8", "fp8_rowwise")
    )  # fmt: skip
    assert rowwise / tensorwise == pytest.approx(6424 / 7186, rel=0.06)


@pytest.mark.parametrize(("precision", "forward", "backward"), [("fp8", 1, 1), ("mxfp8", 3, 5)])
def test_the_host_issues_the_casts_of_every_expert(precision, forward, backward):
    # Forward: a cast of the input, and both scales swizzled for one product; backward: a cast, and four scales for two. The
    # weight is cast once in a step.
    built = assembly(
        "qwen3-30b-a3b", "b200:1x8", "megatron-bridge", planner.TrainWorkload(8, 4096, precisions=(precision,)),
        precision=precision, ep=8, zero_stage="1",
    )  # fmt: skip
    ledger = built.parts[0].ledger
    for phase, each in (("forward", forward), ("backward", backward), ("step", 1)):
        casts = [
            item
            for item in ledger.of(Stream, phase=phase)
            if "expert" in item.tags and ".quantise" in item.what
        ]
        calls = [float(dispatches(item, ledger.axes)[0]) for item in casts]
        assert calls == [each * 128 / 8] * 2  # two products


def casts_of_weights(stack, **fixed):
    """Bytes that one micro-batch and one step move to cast a layer's weights, and bytes of the casts that stay, per parameter."""
    ledger = assembly(
        "llama3-8b", "h100-sxm:1x8", stack, planner.TrainWorkload(64, 8192, precisions=("fp8",)), precision="fp8", **fixed
    ).parts[0].ledger  # fmt: skip
    parameters = (
        4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    )  # of Llama 3 8B's layer, in its products
    casts = [i for i in ledger.of(Stream, block="dense") if i.what.endswith("quantise_weights")]
    held = [i for i in ledger.of(Resident, pool="parameters", block="dense") if "quantised" in i.what]
    groups = ([i for i in casts if i.phase == "forward"], [i for i in casts if i.phase == "step"], held)
    return [total_bytes(ledger, group) / parameters for group in groups]


def test_weights_are_cast_once_per_step_and_kept_where_the_stack_says_so():
    # Read in 2 bytes, written in 1 as they are and in 1 transposed (Transformer Engine, FP8 weight caching).
    assert casts_of_weights("megatron-core", zero_stage="1") == pytest.approx([0.0, 4.0, 2.0])
    # Megatron-Bridge's fp8 recipes keep nothing else of a weight (fp8_param_gather): no more than its 2 bytes. They read it once
    # more before, for its scale ("tensorwise").
    assert casts_of_weights("megatron-bridge", zero_stage="1") == pytest.approx([0.0, 6.0, 0.0])
    assert casts_of_weights("megatron-core", zero_stage="fsdp") == pytest.approx([4.0, 0.0, 0.0])
    assert casts_of_weights("pytorch-fsdp", zero_stage="1") == pytest.approx([4.0, 0.0, 0.0])


@pytest.mark.parametrize(("stack", "precision", "moved"), [
    ("megatron-bridge", "fp8", 2 + 2 + 1 + 1), ("megatron-core", "fp8", 2 + 1 + 1), ("megatron-bridge", "mxfp8", 2 + 2 * 33 / 32),
])  # fmt: skip
def test_a_scale_of_the_tensor_itself_is_found_in_a_pass_of_its_own(stack, precision, moved):
    # Transformer Engine's Float8CurrentScalingQuantizer: compute_amax, compute_scale_from_amax, quantize. A scale of 32 elements
    # is found where they are cast.
    ledger = assembly(
        "llama3-8b", "b200:1x8", stack, planner.TrainWorkload(8, 8192, precisions=(precision,)), precision=precision,
    ).parts[0].ledger  # fmt: skip
    casts = [i for i in ledger.of(Stream, block="dense") if i.what == "mlp.fc1.quantise"]
    assert {i.bytes_per_element for i in casts} == {moved}


def exchanges_of(**fixed):
    """Collectives of a DeepSeek-V3 layer's forward on 64 ranks of eight nodes, with their seconds."""
    part = assembly(
        "deepseek-v3", "h100-sxm:8x8", job=planner.TrainWorkload(64, 4096), ep=64, precision="bf16", **fixed
    ).parts[0]
    items = [i for i in part.ledger.of(Collective, phase="forward") if i.kind == "all_to_all"]
    return [
        (i, float(np.ravel(s)[0]))
        for i, s in zip(items, part.pricer.prices(items, part.ledger.axes), strict=True)
    ]


def test_without_priority_a_third_of_an_exchange_hides():
    # Megatron-Bridge's moe-comm-overlap page: 3,959 ms of communication, 36.55 % of it, ran beside products and attention.
    def by_track(**fixed):
        seconds = {"main": 0.0, "exchange": 0.0}
        for item, price in exchanges_of(**fixed):
            seconds[item.track] += price
        return seconds

    serial = by_track()
    whole = by_track(expert_overlap="combined_1f1b")
    plain = by_track(expert_overlap="combined_1f1b", exchange_stream="plain")
    assert serial["exchange"] == whole["main"] == 0.0
    assert plain["exchange"] == pytest.approx(0.3655 * whole["exchange"])
    assert plain["main"] + plain["exchange"] == pytest.approx(serial["main"])


def test_neighbouring_experts_are_on_few_nodes():
    # 8 of 256 experts in turn on 64 ranks: two ranks of one node. Anywhere: 64 (1 - (63/64)^8) ranks, 8 (1 - (7/8)^8) nodes.
    # 51.4 MB of tokens leave the node with 7/8, at 46 GB/s.
    tokens = 4096 * 7168 * 2.0
    for routing, nodes in (("anywhere", 8 * (1 - (7 / 8) ** 8)), ("neighbours", 1.0)):
        (_, dispatch), _ = exchanges_of(routing=routing)
        assert dispatch == pytest.approx(nodes * 7 / 8 * tokens / 46e9, rel=0.15)


def test_deepep_copies_on_its_multiprocessors():
    # 20 of them at 12.0 GB/s each (exchange_libraries.toml), one node, tokens to 8 (1 - (7/8)^8) of 8 ranks.
    def dispatch(how):
        part = assembly(
            "qwen3-30b-a3b", "h100-sxm:1x8", job=planner.TrainWorkload(32, 4096), ep=8, precision="bf16", dispatch=how,
            micro_batch_size=4,
        ).parts[0]  # fmt: skip
        item = next(i for i in part.ledger.of(Collective, phase="forward") if i.what == "moe.dispatch")
        return float(np.ravel(part.pricer.prices([item], part.ledger.axes)[0])[0])

    sent = 4 * 4096 * 2048 * 2.0 * 8 * (1 - (7 / 8) ** 8)
    assert dispatch("deepep") == pytest.approx(sent / (20 * 12.0e9), rel=0.05)
    assert dispatch("fused") < 0.8 * dispatch("deepep")


def test_an_input_that_no_weight_gradient_reads_is_written_once():
    def per_element(**fixed):
        ledger = assembly(
            "llama3-8b", "h100-sxm:1x8", job=planner.TrainWorkload(8, 8192, precisions=("fp8",)), precision="fp8", **fixed
        ).parts[0].ledger  # fmt: skip
        return {i.bytes_per_element for i in ledger.of(Stream, block="dense") if i.what == "mlp.fc1.quantise"}

    assert (per_element(), per_element(adaptation="lora")) == ({4.0}, {3.0})


def test_deepspeed_sums_whole_gradients_behind_the_backward():
    # deepspeed/runtime/zero/stage_1_and_2.py: average_tensor all-reduces; overlap_comm is off below stage 3.
    spends = assembly(stack="megatron-deepspeed", zero_stage="1").spends
    mine = [s for s in spends if isinstance(s.share.item, Collective) and s.share.item.track == "gradients"]
    assert {s.share.item.kind for s in mine} == {"all_reduce"}
    assert sum(s.seconds for s in mine) == pytest.approx(sum(s.alone_s for s in mine))


def test_gathers_of_eight_bits_are_half_as_long():
    kinds = ({"precision": "fp8"}, {"precision": "fp8_rowwise"}, {"precision": "bf16"})
    widths = []
    for fixed in kinds:
        ledger = assembly(
            "llama3-8b", "h100-sxm:1x8", "pytorch-fsdp", tp=2, sequence_parallel="true", zero_stage="fsdp",
            job=planner.TrainWorkload(8, 8192, precisions=(fixed["precision"],)), **fixed,
        ).parts[0].ledger  # fmt: skip
        widths.append(
            {
                i.dtype
                for i in ledger.of(Collective, block="dense")
                if i.kind == "all_gather" and "cp" not in i.tags
            }
        )
    assert widths == [
        {"fp8"},
        {"bf16"},
        {"bf16"},
    ]  # one scale per tensor alone can be agreed on before the gather


def test_a_graph_of_a_whole_iteration_has_one_product_for_all_experts():
    def products(how, slower=1.0):
        constants = {"matmul_slowdown": slower}
        one = assembly(
            "qwen3-30b-a3b", "gb200-nvl72:2x4", "megatron-bridge", constants=constants, cuda_graph=how, ep=8, precision="bf16"
        )  # fmt: skip
        part = one.parts[0]
        items = [i for i in part.ledger.of(Matmul, phase="forward") if i.grouped]
        seconds = sum(float(np.ravel(s)[0]) for s in part.pricer.prices(items, part.ledger.axes))
        return [float(np.ravel(dispatches(i, part.ledger.axes))[0]) for i in items], seconds

    (each, eager_s), (single, captured_s) = products("none"), products("full")
    assert each == [128 / 8] * 2  # one per expert of the rank, for each of the two products
    assert single == [1.0, 1.0]
    # Issued one by one they are the stack's products like others; the one kernel is the device's own.
    assert products("none", 1.5)[1] == pytest.approx(1.5 * eager_s)
    assert products("full", 1.5)[1] == captured_s


@pytest.mark.parametrize(
    ("model", "how", "forward", "backward"),
    [
        ("qwen3-30b-a3b", "none", 22.0, 130.0),
        ("gpt-oss-20b", "none", 52.0, 178.0),  # its limits: 8 passes of 2 bytes forward, 10 backward
        ("gpt-oss-20b", "full", 6.0, 10.0),  # Transformer Engine's fused operators: 3 passes and 5
    ],
)
def test_activations_of_experts_run_operator_by_operator_in_megatron_core(model, how, forward, backward):
    ledger = assembly(
        model, "h100-sxm:1x8", "megatron-bridge", ep=8, precision="bf16", cuda_graph=how
    ).parts[0].ledger  # fmt: skip
    moved = {i.phase: i.bytes_per_element for i in ledger.of(Stream, what="moe.act", block="moe")}
    assert moved == {"forward": forward, "backward": backward}
    limits = [i for i in ledger.of(Resident) if i.what == "moe.act.unlimited"]
    assert bool(limits) == (forward == 52.0)


@pytest.mark.parametrize(
    ("ep", "dispatch", "passes"),
    [
        (8, "fused", 2.0),
        (
            8,
            "copied",
            (1 + 1 / 4 + 2) * 0.8 / 0.506,
        ),  # a token to its 4 rows, and all rows into the order of 4 experts
        (32, "copied", (1 + 1 / 4) * 0.8 / 0.506),  # one expert on a rank: ranks' order is experts'
    ],
)
def test_an_all_to_all_has_copies_before_it_and_behind(ep, dispatch, passes):
    part = assembly(
        "gpt-oss-20b",
        "h100-sxm:4x8",
        job=planner.TrainWorkload(32, 1024),
        ep=ep,
        precision="bf16",
        dispatch=dispatch,
    ).parts[0]
    (copy,) = (i for i in part.ledger.of(Stream, phase="backward", block="moe") if i.what == "moe.unpermute")
    reached = float(part.pricer.device.efficiency.memory) / 0.8  # copies reach 0.506 of the data sheet's rate
    moved = float(np.ravel(part.ledger.axes[copy.size])[0]) * copy.bytes_per_element
    elements = 1024 * 4 * 2880
    assert moved == pytest.approx(2.0 * elements * passes * (reached if dispatch == "copied" else 1.0))


@pytest.mark.parametrize(
    ("phase", "n_bytes", "calls"), [("forward", 28.0, 2 * 4 + 2), ("backward", 40.0, 6 * 4 + 2)]
)
def test_biases_of_experts_are_scaled_in_fp32_expert_by_expert(phase, n_bytes, calls):
    ledger = assembly("gpt-oss-20b", "h100-sxm:1x8", ep=8, precision="bf16").parts[0].ledger
    (bias,) = (i for i in ledger.of(Stream, phase=phase, block="moe") if i.what == "moe.bias")
    # Forward, in bytes of bf16 and fp32: product 4 written, sum 2 + 4 read and 4 written, concatenation 4 + 4, cast 4 + 2.
    # Backward: cast 2 + 4, the output's gradient 4 + 2 and put together 2 + 2, two products of 4 + 4 and their sums of 4 each.
    elements = 1024 * 4 * 2880  # a micro-batch of one sequence, four experts a token
    assert float(np.ravel(ledger.axes[bias.size])[0]) * bias.bytes_per_element == pytest.approx(
        n_bytes * elements
    )
    assert float(np.ravel(dispatches(bias, ledger.axes))[0]) == calls  # 4 of 32 experts on a rank


@pytest.mark.parametrize(
    ("fixed", "gradients", "update"),
    [
        # BF16_Optimizer: 2 bytes of .grad beside accumulators of 4, which the update reads as they are; flat buffers of 2.
        ({"precision": "bf16", "gradient_dtype": "fp32"}, 6.0, 2.0),
        # fp16: 2 bytes, which the update copies in fp32 beside the flat buffers.
        ({"precision": "fp16", "gradient_dtype": "fp16"}, 2.0, 6.0),
    ],
)
def test_deepspeed_keeps_gradients_of_16_bits_beside_accumulators_in_fp32(fixed, gradients, update):
    job = planner.TrainWorkload(8, 1024, precisions=(fixed["precision"],))
    ledger = assembly(stack="megatron-deepspeed", job=job, zero_stage="0", **fixed).parts[0].ledger
    weights = held_bytes(ledger, "parameters") / 2.0
    assert held_bytes(ledger, "gradients") / weights == pytest.approx(gradients)
    copies = [item for item in ledger.of(Resident) if "update" in item.tags]
    assert total_bytes(ledger, copies) / weights == pytest.approx(update)


def test_experts_ahead_of_the_last_layer_run_like_all_others():
    # Multi-token prediction is one more layer of experts, behind the head (arXiv:2412.19437, section 2.2).
    model = replace(planner.load_model("deepseek-v3"), mtp_modules=1)
    fixed = {"ep": 64, "pp": 8}
    problem = planner.Problem(
        model, planner.load_cluster("h100-sxm:64x8"), planner.TrainWorkload(512, 4096), load_stack("megatron-core"), fixed
    )  # fmt: skip
    ledger = examine(problem).parts[0].ledger
    for what in ("moe.act", "moe.permute"):
        (layer,), (ahead,) = (
            ledger.of(Stream, what=what, phase="forward", block=block) for block in ("moe", "head")
        )
        assert ahead.bytes_per_element == layer.bytes_per_element
        assert float(ledger.axes[ahead.size].flat[0]) == pytest.approx(float(ledger.axes[layer.size].flat[0]))
