"""What training software holds besides states and activations: loss, update, buckets, pipeline tensors, allocator."""

from dataclasses import replace

import pytest

import planner
from planner.ledger import Resident
from planner.specs.parameters import parameter_count
from planner.techniques import figures

LLAMA = planner.load_model("llama3-8b")
VOCABULARY, HIDDEN, LAYERS = 128256, 4096, 32  # Llama 3 8B, config.json
TOKENS = 8192


def estimate(stack, cluster="h100-sxm:1x8", seq_len=256, **fixed):
    """Llama 3 8B with full recompute."""
    return examined(planner.load_stack(stack), cluster, seq_len, **fixed).plan.estimate


def examined(stack, cluster, seq_len, **fixed):
    fixed = {
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "micro_batch_size": 1,
        "zero_stage": "1",
        "recompute": "full",
        **fixed,
    }
    workload = planner.TrainWorkload(global_batch_size=64, seq_len=seq_len)
    return planner.examine(
        planner.Problem(LLAMA, planner.load_cluster(cluster), workload, stack, fixed=fixed)
    )


def logits_bytes(loss, **degrees):
    """Bytes per logit that a rank holds, at most."""
    subject = next(t.apply for t in figures_of("loss_kernel") if loss in t.choices)
    ledger, _ = figures.run("loss_kernel", subject, model=LLAMA, seq=TOKENS, loss_kernel=loss, **degrees)
    held = figures.total_bytes(ledger, ledger.of(Resident, pool="logits", lifetime="block"))
    return held * degrees.get("tp", 1) / (TOKENS * VOCABULARY)


def figures_of(slot):
    from planner.technique import discover

    return [technique for technique in discover().values() if technique.slot == slot]


@pytest.mark.parametrize(
    ("loss", "tp", "n_bytes"),
    [
        # Megatron-Core's tensor_parallel/cross_entropy.py: logits in bf16, and their cast to fp32, which becomes the softmax and
        # the gradient in place.
        ("eager", 1, 2 + 4),
        ("eager", 2, 2 + 4),
        # PyTorch: log-probabilities and two gradients in fp32; over a sharded vocabulary the softmax as well
        # (torch/distributed/tensor/_ops/_math_ops.py).
        ("log_softmax", 1, 3 * 4),
        ("log_softmax", 2, 4 * 4),
    ],
)
def test_bytes_per_logit(loss, tp, n_bytes):
    assert logits_bytes(loss, tp=tp) == pytest.approx(n_bytes)


def test_zero_1_of_deepspeed_holds_22_bytes_per_parameter_on_one_rank():
    # Weights, gradients and their flat copy 2 bytes each, gradients in fp32 4, states 12 (deepspeed/runtime/bf16_optimizer.py).
    found = estimate("megatron-deepspeed", "h100-sxm:1x1", gradient_dtype="bf16")
    outside = found.memory_bytes["framework"]
    assert (found.memory_bytes["peak"] - outside) / parameter_count(LLAMA) == pytest.approx(22.0)


def test_an_update_needs_memory_only_beyond_what_the_passes_have_freed():
    # 6 bytes of 8.03e9/8 parameters are 6.02e9; activations and workspace of 32 sequences of 8192 exceed them.
    short, long = (estimate("megatron-deepspeed", seq_len=seq, gradient_dtype="bf16") for seq in (256, 8192))
    held = ("activations", "workspace", "fragmentation", "update")
    assert sum(short.memory_bytes.get(pool, 0.0) for pool in held) == pytest.approx(6 * 8.03e9 / 8, rel=1e-3)
    assert "update" not in long.memory_bytes


def test_buckets_are_no_larger_than_the_gradients_and_only_between_replicas():
    # Llama 3 8B's 16-bit gradients are 16.1e9 bytes, a bucket 1e9 (deepspeed/runtime/bf16_optimizer.py and zero/config.py);
    # over 32 stages a device has half a bucket of them on average.
    stack = planner.load_stack("megatron-deepspeed")
    copies = stack.bucket_copies.value

    def buckets(**fixed):
        return estimate(stack.name, gradient_dtype="bf16", **fixed).memory_bytes.get("buffers", 0.0)

    assert buckets() == pytest.approx(copies * 1e9)
    assert buckets(cluster="h100-sxm:1x1") == 0.0
    least = copies * (parameter_count(LLAMA) - 2 * VOCABULARY * HIDDEN) * 2 / 32
    assert buckets(cluster="h100-sxm:8x8", pp=32) >= least > 0.0


def test_a_stage_that_frees_nothing_holds_its_output_per_micro_batch_in_flight():
    # Before Megatron-Core's deallocate_pipeline_outputs: a tensor of 8192 x 4096 x 2 bytes for each of four micro-batches on
    # the first of four stages, and none without stages.
    def activations(pp, stack):
        found = estimate(stack, seq_len=TOKENS, pp=pp, attention_kernel="flash", recompute="none")
        return found.memory_bytes["activations"]

    differences = [activations(pp, "megatron-eager") - activations(pp, "default") for pp in (1, 4)]
    assert differences == pytest.approx([0.0, 4 * TOKENS * HIDDEN * 2])


def test_schedules_that_return_outputs_hold_the_logits_of_every_micro_batch():
    # torch.distributed.pipelining until return_outputs=False: 64 micro-batches of 1024 x 128256 logits in bf16 on the last of two
    # stages, and as much again for their concatenation, which an allocator takes anew. One stage is no pipeline.
    now = planner.load_stack("pytorch-fsdp")
    then = replace(now, habits={**now.habits, "stage_outputs": "returned"})
    outputs = 64 * 1024 * VOCABULARY * 2
    for pp, expected in ((2, outputs), (1, 0.0)):
        found = [examined(s, f"b200:1x{pp}", seq_len=1024, pp=pp, zero_stage="0") for s in (now, then)]
        held = [[sum(pools.values()) for pools in one.device_memory] for one in found]
        assert held[1][-1] - held[0][-1] == pytest.approx(expected)
        assert held[1][:-1] == held[0][:-1]
        assert found[1].device_cached[-1] - found[0].device_cached[-1] == pytest.approx(expected)


def test_what_an_allocator_keeps_is_bounded_by_the_device():
    roomy = estimate("pytorch-fsdp", seq_len=TOKENS, zero_stage="fsdp", micro_batch_size=1)
    tight = estimate("pytorch-fsdp", seq_len=TOKENS, zero_stage="fsdp", micro_batch_size=4)
    # The logits' 16 bits, freed before tensors come that are larger than they.
    assert roomy.cached_bytes >= TOKENS * VOCABULARY * 2
    assert tight.cached_bytes == pytest.approx(
        max(tight.memory_budget_bytes - tight.memory_bytes["peak"], 0.0)
    )


def with_habits(stack, **habits):
    base = planner.load_stack(stack)
    return replace(base, habits={**base.habits, **habits})


def held_and_cached(stack, cluster="b200:1x8", seq_len=TOKENS, **fixed):
    """Bytes on every run of equal devices: of the prediction, and what the allocator keeps beside it."""
    found = examined(stack, cluster, seq_len, **fixed)
    return [sum(pools.values()) for pools in found.device_memory], found.device_cached


def differences(habit, before, after, **fixed):
    (held, cached), (held_after, cached_after) = (
        held_and_cached(with_habits("pytorch-fsdp", **{habit: way}), **fixed) for way in (before, after)
    )
    return held_after[-1] - held[-1], cached_after[-1] - cached[-1]


def test_a_root_that_is_not_resharded_holds_both_ends_beside_the_loss():
    # FSDPState._lazy_init: bf16 of embedding, head (128256 x 4096 each) and final norm, from forward to backward. One unit, they
    # are gathered into a tensor as large, where the larger of them alone took one of its own size.
    ends = 2 * (2 * VOCABULARY * HIDDEN + HIDDEN)
    held, cached = differences("end_weights", "resharded", "kept", zero_stage="fsdp")
    assert held == pytest.approx(ends)
    assert cached == pytest.approx(ends - 2 * (VOCABULARY * HIDDEN + HIDDEN))


def test_gradients_reduced_to_new_shards_meet_the_freed_passes_memory():
    # FSDP2 in a pipeline's stage: fp32 shares of all parameters over 8 ranks, and a unit gathered in bf16, the largest of which
    # is the head with the final norm.
    _, cached = differences("shards", "in_place", "apart", zero_stage="1", gradient_dtype="fp32")
    share, unit = 4 * parameter_count(LLAMA) / 8, 2 * (VOCABULARY * HIDDEN + HIDDEN)
    assert cached == pytest.approx(share + unit)


def test_every_micro_batch_of_a_pipeline_has_a_buffer_to_receive_in():
    # torch.distributed.pipelining: 64 micro-batches of 1024 x 4096 in bf16 on every one of two stages of 16 layers.
    received = 64 * 1024 * HIDDEN * 2
    held, _ = differences(
        "stage_inputs", "reused", "each_micro_batch", cluster="b200:1x2", seq_len=1024, pp=2
    )
    assert held == pytest.approx(received)
    assert differences("stage_inputs", "reused", "each_micro_batch", cluster="b200:1x2", pp=1)[0] == 0.0


def test_expandable_segments_grow_out_of_what_layers_have_freed():
    # What a recomputed layer holds at most lies beside the logits where segments are fixed: weights in bf16, gradients in fp32,
    # and of every token the MLP's bf16 tensors (both inputs of the activation, their gradients, its output: 14336 wide) and
    # less than as much again of attention and norms.
    layer = (parameter_count(LLAMA) - 2 * VOCABULARY * HIDDEN - HIDDEN) / LAYERS
    network = TOKENS * 5 * 14336 * 2
    _, cached = differences("segments", "expandable", "fixed", zero_stage="fsdp", gradient_dtype="fp32")
    assert network < cached - layer * (2 + 4) < 2 * network


@pytest.mark.parametrize(("overlap", "sent"), [("none", 4), ("chunked", 1)])
def test_tensors_on_their_way_are_recorded_unless_their_memory_is_symmetric(overlap, sent):
    # A layer gathers two inputs and scatters two outputs of 8192 x 4096 in bf16, an embedding scatters one, which no product has
    # made; the head's loss is at work.
    degrees = {"tp": 2, "zero_stage": "0", "tensor_overlap": overlap, "attention_kernel": "flash"}
    stack = with_habits("pytorch-fsdp", shards="in_place")
    (_, gathered), (_, again) = (
        held_and_cached(stack, cluster="b200:1x2", sequence_parallel=kind, **degrees)
        for kind in ("gathered", "true")
    )
    assert gathered[-1] - again[-1] == pytest.approx(sent * TOKENS * HIDDEN * 2)
