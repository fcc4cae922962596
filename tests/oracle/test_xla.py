"""Does the ledger say what XLA's SPMD compiler does? FLOP, bytes held and collectives of one block's training step.

One process compiles every case for virtual CPU devices (``xla/``); here the same recipe is applied to the ledger of the same
block, and the two are compared exactly. A difference is either one of ``KNOWN`` or a failure.
"""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from planner.ledger import Collective, Matmul, Resident
from planner.mesh import Mesh
from planner.operators.baseline import baseline
from planner.specs.hardware import load_cluster
from planner.specs.model import Attention, Block, Mlp, Model
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, Context, discover

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="jax is not installed (extra: test)"),
]

BATCH, SEQ = 3, 48  # of one data-parallel rank
TOKENS = BATCH * SEQ  # equals none of the widths below: only weight gradients contract over it
FP32_BYTES = 4
MODELS = {
    "llama": {"hidden": 128, "heads": 32, "kv_heads": 8, "head_dim": 4, "ffn": 192, "llama": True},
    "gpt": {"hidden": 128, "heads": 16, "kv_heads": 16, "head_dim": 8, "ffn": 512, "llama": False},
}


def case(model, *, dp=1, tp=1, sp=False, zero=0, recompute="none", automatic=False):
    sizes = {"dp": dp, "tp": tp, "sequence_parallel": sp, "zero_stage": zero}
    return {"model": model, **sizes, "recompute": recompute, "automatic": automatic}


OPERATORS = (*(f"attention.{name}" for name in ("qkv", "scores", "context", "output")), "mlp.fc1", "mlp.fc2")
POOLS = {"parameters": "parameters", "gradients": "gradients", "moment": "optimizer"}  # by argument

EXPLICIT = {
    "tp2": case("gpt", tp=2),
    "tp4": case("llama", tp=4),
    "tp8": case("llama", tp=8),
    "tp16, 8 KV heads": case("llama", tp=16),
    "tp16": case("gpt", tp=16),
    "tp2 sp": case("llama", tp=2, sp=True),
    "tp4 sp": case("gpt", tp=4, sp=True),
    "tp16 sp, 8 KV heads": case("llama", tp=16, sp=True),
    "tp2 sp gathered": case("gpt", tp=2, sp="gathered"),
    "dp2 tp8 sp gathered": case("llama", dp=2, tp=8, sp="gathered"),
    "dp2": case("llama", dp=2),
    "dp16": case("gpt", dp=16),
    "dp2 tp8": case("llama", dp=2, tp=8),
    "dp4 tp4 sp": case("gpt", dp=4, tp=4, sp=True),
    "zero1 dp4": case("llama", dp=4, zero=1),
    "zero1 dp4 tp4": case("gpt", dp=4, tp=4, zero=1),
    "zero2 dp8 tp2 sp": case("llama", dp=8, tp=2, sp=True, zero=2),
    "zero3 dp2": case("gpt", dp=2, zero=3),
    "zero3 dp16": case("llama", dp=16, zero=3),
    "zero3 dp4 tp2": case("llama", dp=4, tp=2, zero=3),
    "zero3 dp8 tp2 sp": case("gpt", dp=8, tp=2, sp=True, zero=3),
}
RECOMPUTED = {
    "tp4 recompute": case("llama", tp=4, recompute="full"),
    "dp2 tp8 recompute": case("gpt", dp=2, tp=8, recompute="full"),
    "dp2 tp4 sp recompute": case("llama", dp=2, tp=4, sp=True, recompute="full"),
    "tp4 sp gathered recompute": case("gpt", tp=4, sp="gathered", recompute="full"),
    "zero3 dp4 tp2 recompute": case("gpt", dp=4, tp=2, zero=3, recompute="full"),
}
AUTOMATIC = {
    f"{name} automatic": case(model, **sizes, automatic=True)
    for name, model, sizes in (
        ("tp2", "gpt", {"tp": 2}),
        ("tp8", "llama", {"tp": 8}),
        ("dp4", "gpt", {"dp": 4}),
        ("dp16", "llama", {"dp": 16}),
        ("dp2 tp4", "gpt", {"dp": 2, "tp": 4}),
        ("dp4 tp4", "llama", {"dp": 4, "tp": 4}),
        ("fsdp2", "llama", {"dp": 2, "zero": 3}),
        ("fsdp8", "gpt", {"dp": 8, "zero": 3}),
        ("fsdp16", "llama", {"dp": 16, "zero": 3}),
    )
}
CASES = EXPLICIT | RECOMPUTED | AUTOMATIC


# -- the closed list of differences: each says what XLA does beyond the ledger, as signed amounts ------------------------


def last_product_not_recomputed(case, ours):
    """Nothing in the backward needs the block's last product, so jax.checkpoint leaves it and its reduction out.

    A launcher that runs the block's forward again (Megatron's ``CheckpointFunction``) computes it.
    """
    if case["recompute"] != "full":
        return Counter(), Counter()
    kind = "reduce_scatter" if case["sequence_parallel"] else "all_reduce"
    reduction = ("recompute", kind, case["tp"], 1, TOKENS * MODELS[case["model"]]["hidden"] * FP32_BYTES)
    return Counter({("recompute", "mlp.fc2"): -ours.flop["recompute", "mlp.fc2"]}), Counter({reduction: -1})


def recomputed_inputs_stay_gathered(case, ours):
    """jax.checkpoint keeps the inputs that the recomputation gathers for the weight gradients; Megatron gathers them again."""
    if case["recompute"] != "full" or case["sequence_parallel"] is not True:
        return Counter(), Counter()
    gather = ("backward", "all_gather", case["tp"], 1, TOKENS * MODELS[case["model"]]["hidden"] * FP32_BYTES)
    return Counter(), Counter({gather: -2})


def weights_gathered_before_recomputation(case, ours):
    """ZeRO-3's gather for the backward already serves the recomputation before it; the ledger counts it with the backward."""
    if case["recompute"] != "full" or case["zero_stage"] != 3:
        return Counter(), Counter()
    gather = ("all_gather", case["dp"], case["tp"], ours.held_bytes["parameters"] * case["dp"])
    return Counter(), Counter({("recompute", *gather): 1, ("backward", *gather): -1})


def gains_gathered_twice(case, ours):
    """The partitioner gathers a matrix once and keeps it, a norm's gain once forward and once backward.

    Its gradients are all-reduced whole: the all-gather half is as large as the second gather of everything, which the ledger
    counts, so that only the second gather of the gains stands out.
    """
    if not case["automatic"] or case["zero_stage"] != 3:
        return Counter(), Counter()
    gains_bytes = 2 * MODELS[case["model"]]["hidden"] * FP32_BYTES
    return Counter(), Counter({("all_gather", case["dp"], 1): gains_bytes})


KNOWN = (
    last_product_not_recomputed,
    recomputed_inputs_stay_gathered,
    weights_gathered_before_recomputation,
    gains_gathered_twice,
)


# -- the tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_program_computes_the_step_of_one_device(xla, name):
    assert xla[name]["error"] < 1e-5  # fp32, sums in another order


@pytest.mark.parametrize("name", CASES)
def test_flop_of_every_operator_and_phase(xla, ledgers, name):
    expected = with_known(CASES[name], ledgers[name], ledgers[name].flop, 0)
    assert xla_flop(CASES[name], xla[name]) == expected


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_parameters_gradients_and_optimizer(xla, ledgers, name):
    held = Counter()
    for argument in xla[name]["arguments"]:
        held[next((pool for name, pool in POOLS.items() if name in argument["name"]), "activations")] += (
            argument["bytes"]
        )
    assert held == ledgers[name].held_bytes
    assert xla[name]["argument_bytes"] == held.total()


@pytest.mark.parametrize("name", EXPLICIT | RECOMPUTED)
def test_every_collective_of_a_program_as_written(xla, ledgers, name):
    expected = with_known(CASES[name], ledgers[name], ledgers[name].collectives, 1)
    assert xla_collectives(CASES[name], xla[name]) == expected


@pytest.mark.parametrize("name", AUTOMATIC)
def test_bytes_of_the_collectives_that_the_partitioner_chose(xla, ledgers, name):
    expected = with_known(CASES[name], ledgers[name], halves(ledgers[name].collectives), 1)
    assert halves(xla_collectives(CASES[name], xla[name])) == expected


@pytest.mark.parametrize("difference", KNOWN, ids=lambda difference: difference.__name__)
def test_every_known_difference_is_seen(ledgers, difference):
    assert any(any(difference(CASES[name], ledgers[name])) for name in CASES)


# -- XLA's side ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xla():
    """What the partitioner made of every case."""
    job = json.dumps({"models": MODELS, "batch": BATCH, "seq": SEQ, "cases": CASES})
    command = [sys.executable, "-m", "xla"]
    here = Path(__file__).parent
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def xla_flop(case, found):
    flop = Counter()
    for product in found["products"]:
        phase = xla_phase(case, product["name"])
        if phase == "backward" and product["k"] == TOKENS:
            phase = "weight"
        operator = next(o for o in OPERATORS if o in product["name"])
        flop[phase, operator] += product["flop"]
    return flop


def xla_collectives(case, found):
    several = (c for c in found["collectives"] if c["size"] > 1)
    return Counter(
        (xla_phase(case, c["name"]), c["kind"], c["size"], c["stride"], c["bytes"]) for c in several
    )


def xla_phase(case, name):
    """The phase that jax's transformations left in an instruction's name."""
    if case["recompute"] == "full" and "rematted_computation" in name:
        return "recompute"
    return "forward" if "jvp(" in name and "transpose(" not in name else "backward"


# -- the ledger's side ---------------------------------------------------------------------------------------------------


class Ours:
    """The ledger of a case in the oracle's terms: ``flop``, ``collectives``, ``held_bytes`` of one block."""

    def __init__(self, case):
        axes, items = ledger_of(case)
        self.flop, self.collectives, self.held_bytes = Counter(), Counter(), Counter()
        residual_bytes = axes("batch*residual_seq*hidden") * FP32_BYTES
        self.held_bytes["activations"] = 2 * residual_bytes  # the input, and the output's gradient
        for item in items:
            if isinstance(item, Matmul):
                flop = 2 * axes(item.groups) * axes(item.m) * axes(item.n) * axes(item.k)
                self.flop[item.phase, item.what] += flop
            elif isinstance(item, Collective) and item.group.size[0] > 1:
                assert axes(item.messages) <= 1
                # When gradients are reduced, in the backward or after it, is the schedule's business.
                phase = "backward" if item.phase == "step" else item.phase
                size, stride = int(item.group.size[0]), int(item.group.stride[0])
                self.collectives[phase, item.kind, size, stride, axes(item.size) * FP32_BYTES] += 1
            elif isinstance(item, Resident) and item.lifetime == "always":
                self.held_bytes[item.pool] += axes(item.size) * item.bytes_per_element


def ledger_of(case):
    """Sizes and items of one block after the passes of the case's recipe."""
    dims, (dp, tp) = MODELS[case["model"]], (np.array([float(case[d])]) for d in ("dp", "tp"))
    recipe = {
        "precision": "fp32",
        "attention_kernel": "eager",
        "tensor": "1d",
        "sequence_parallel": str(case["sequence_parallel"]).lower(),
        "optimizer": "adamw",
        "zero_stage": str(case["zero_stage"]),
        "recompute": case["recompute"],
    }
    one = np.ones(1)
    ctx = Context(
        model_of(dims), load_cluster("h100-sxm:2x8"), TrainWorkload(BATCH * case["dp"], SEQ),
        load_stack(), Mesh(tp, one, dp, one, one, one), BATCH * one, recipe,
    )  # fmt: skip
    ledger = baseline(ctx.model, batch=ctx.micro_batch_size, seq=SEQ)
    for slot in SLOTS:
        for technique in discover().values():
            if technique.slot == slot and recipe.get(slot) in technique.choices:
                ledger = technique.apply(ledger, ctx)
    items = [item for item in ledger.items if item.block == "block"]
    return lambda size: float(np.ravel(ledger.axes[size])[0]), items


def model_of(dims):
    biased = not dims["llama"]
    attention = Attention(dims["heads"], dims["kv_heads"], dims["head_dim"], qkv_bias=biased, out_bias=biased)
    mlp = Mlp(dims["ffn"], gated=dims["llama"], bias=biased)
    block = Block(attention=attention, mlp=mlp, norm="rmsnorm" if dims["llama"] else "layernorm")
    return Model(
        name="block", family="block", arch="decoder", hidden=dims["hidden"], vocab=0, max_seq_len=SEQ, blocks={"block": block},
        layers=(("block", 1),), learned_positions=0 if dims["llama"] else SEQ,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ledgers():
    return {name: Ours(case) for name, case in CASES.items()}


# -- comparing -----------------------------------------------------------------------------------------------------------


def with_known(case, ours, amounts, part):
    """Our amounts and the known differences (``part`` 0: FLOP, 1: collectives); what comes to nothing is left out."""
    total = Counter(amounts)
    for difference in KNOWN:
        total.update(difference(case, ours)[part])
    return Counter({key: amount for key, amount in total.items() if amount})


def halves(collectives):
    """Bytes per kind and group, an all-reduce counted as a reduce-scatter and an all-gather."""
    n_bytes = Counter()
    for (_, kind, size, stride, each), count in collectives.items():
        for half in ("reduce_scatter", "all_gather") if kind == "all_reduce" else (kind,):
            n_bytes[half, size, stride] += each * count
    return n_bytes
