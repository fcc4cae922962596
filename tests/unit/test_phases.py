"""What hides behind what in a block: traffic beside a whole backward, by the bytes that it moves.

Expected values are arithmetic, in the comments.
"""

from __future__ import annotations

import numpy as np
import pytest

import planner
from planner.engine.phases import Lane, Lanes, phase_s
from planner.ledger import Collective, Matmul, Stream
from planner.solve.named import examine
from planner.specs.stack import load_stack

STACK = load_stack("default")


def assembly(model, cluster, stack="default", **fixed):
    problem = planner.Problem(
        planner.load_model(model), planner.load_cluster(cluster), planner.TrainWorkload(64, 4096), load_stack(stack), fixed
    )  # fmt: skip
    return examine(problem)


@pytest.mark.parametrize(
    ("traffic_s", "backward_s", "recompute_s"),
    [
        (6.0, 4.0, 5.0),  # hidden by 4 + 3 seconds of input and weight gradients: nothing is exposed
        (
            9.0,
            6.0,
            3.0,
        ),  # 2 of 9 s outlast 7 s of gradients; a recomputation of 5 s hides them and adds 12 - 9
        (20.0, 17.0, 0.0),  # 20 - 3; what is recomputed fits beside traffic that takes longer anyway
    ],
)
def test_traffic_hides_behind_the_whole_backward_of_a_block(traffic_s, backward_s, recompute_s):
    traffic = Lane(np.array(traffic_s), np.array(0.0))  # of a network so slow that it slows nothing
    backward, weight, again = Lanes(np.array(4.0), (traffic,)), Lanes(np.array(3.0)), Lanes(np.array(5.0))
    assert float(phase_s("backward", backward, [weight], STACK)) == pytest.approx(backward_s)
    assert float(phase_s("weight", weight, [], STACK)) == 3.0
    assert float(phase_s("recompute", again, [backward, weight], STACK)) == pytest.approx(recompute_s)


def test_traffic_hides_behind_what_the_host_takes_to_issue_weight_gradients():
    traffic = Lane(np.array(9.0), np.array(0.0))
    backward = Lanes(np.array(4.0), (traffic,))
    # One second of weight gradients that the host takes three to issue.
    weight = Lanes(np.array(1.0), launches=3.0 / float(STACK.dispatch_s))
    assert float(phase_s("weight", weight, [], STACK)) == pytest.approx(3.0)
    assert float(phase_s("backward", backward, [weight], STACK)) == pytest.approx(9.0 - 3.0)


def test_a_backward_with_its_weight_gradients_and_recomputation_never_gains_from_slower_streams():
    """Slower links lengthen traffic, what of it slows work, and work that waits for collectives: no sum of phases may fall."""
    rng = np.random.default_rng(7)

    def phases(each, launches):
        work_s, traffic_s, contended_s, gather_s = each[:3], each[3:5], each[5:7], each[7]
        beside = tuple(map(Lane, traffic_s, np.minimum(contended_s, traffic_s)))
        backward = Lanes(work_s[0], beside, launches[0])
        weight = Lanes(work_s[1], (), launches[1])
        again = Lanes(work_s[2], (Lane(gather_s, gather_s),), launches[2])
        gradients_s = phase_s("backward", backward, [weight], STACK) + phase_s("weight", weight, [], STACK)
        return gradients_s, gradients_s + phase_s("recompute", again, [backward, weight], STACK)

    fast = rng.exponential(1.0, (8, 10_000)) * rng.choice([0.0, 1.0, 10.0], (8, 10_000))
    slow = fast * np.where(rng.random(fast.shape) < 0.5, 1.0, rng.uniform(1.0, 3.0, fast.shape))
    launches = rng.exponential(1.0 / float(STACK.dispatch_s), (3, 10_000))
    for before_s, after_s in zip(phases(fast, launches), phases(slow, launches), strict=True):
        assert (after_s >= before_s * (1 - 1e-9)).all()


def test_a_slow_network_slows_work_by_its_bytes_alone():
    a = assembly("llama3-8b", "h100-sxm:8x8", zero_stage="fsdp", tp=8)  # eight replicas, one in each node
    part = a.parts[0]
    items = [i for i in part.ledger.items if i.block == "dense" and i.phase == "forward"]
    gather = part.pricer.lanes(items, part.ledger).others[0]
    inner, outer = (tier.effective_bytes_per_s for tier in part.pricer.cluster.tiers[:2])
    # A rank receives 7/8 of the weights through its interface; inside a node all of them take 8/7 x outer/inner of that.
    assert float(np.ravel(gather.contended_s / gather.seconds)[0]) == pytest.approx(
        8 / 7 * outer / inner, rel=0.15
    )
    name, slowdown = a.table.kinds.index("dense"), STACK.overlap_slowdown.value
    main_s, gather_s, contended_s = (
        float(np.ravel(x)[0])
        for x in (part.pricer.lanes(items, part.ledger).main, gather.seconds, gather.contended_s)
    )
    together_s = max(main_s, gather_s) + (slowdown - 1.0) * contended_s
    assert float(a.table["forward_s"][name, 0]) == pytest.approx(together_s)


@pytest.mark.parametrize("recompute", ["none", "full", "block"])
def test_shares_of_hidden_traffic_add_up(recompute):
    layers = {"recompute_layers": 3} if recompute == "block" else {}
    estimate = assembly(
        "llama3-70b", "h100-sxm:8x8", zero_stage="3", recompute=recompute, **layers
    ).plan.estimate
    assert sum(estimate.breakdown_s.values()) == pytest.approx(estimate.step_time_s)
    assert estimate.breakdown_s.get("pipeline_bubble", 0.0) == 0.0  # one stage


def test_megatron_sums_input_gradients_beside_weight_gradients():
    def exposed(stack):
        spends = assembly(
            "gpt3-175b", "a100-sxm-80gb:8x8", stack, tp=8, pp=8, sequence_parallel="false", precision="fp16"
        ).spends
        mine = [s for s in spends if isinstance(s.share.item, Collective) and s.share.item.group.name == "tp"]
        sums = [s for s in mine if s.share.block == "dense" and s.share.phase != "forward"]
        return len(sums), sum(s.seconds for s in sums) / sum(s.alone_s for s in sums)

    assert exposed("megatron-eager") == (2, 1.0)
    count, share = exposed("megatron-2022")
    # Both sums of a layer are shorter than the weight gradients beside them; contention costs a tenth of them (kappa = 1.1).
    assert count == 2
    assert share == pytest.approx(0.1, abs=0.05)


def test_pytorch_gathers_once_and_asynchronous_scatters_are_summed():
    fixed = {"tp": 8, "recompute": "full", "zero_stage": "fsdp"}
    plain, chunked = (
        assembly("llama3-8b", "h100-sxm:1x8", "pytorch-fsdp", tensor_overlap=how, **fixed).parts[0].ledger
        for how in ("none", "chunked")
    )
    gathers = [
        i for i in plain.of(Collective, block="dense") if i.kind == "all_gather" and i.group.name == "tp"
    ]
    # Forward and recomputation gather the inputs of two column-parallel products, the backward the gradients of two outputs.
    assert sorted(i.phase for i in gathers) == ["backward"] * 2 + ["forward"] * 2 + ["recompute"] * 2

    def copied(ledger):
        copies = (i for i in ledger.of(Stream, block="dense", phase="forward") if "sequence_copy" in i.tags)
        return {i.what: float(ledger.axes[i.size].flat[0]) * i.bytes_per_element for i in copies}

    before, after = copied(plain), copied(chunked)
    assert {what.rpartition(".")[0] for what in before.keys() - after.keys()} == {
        "attention.qkv.all_gather", "mlp.fc1.all_gather",
    }  # fmt: skip
    for (
        what,
        n_bytes,
    ) in (
        after.items()
    ):  # 8 parts are read and their sum, an eighth of them, is written; a copy does both in full
        assert n_bytes / before[what] == pytest.approx((1 + 1 / 8) / 2)
    assert len([i for i in chunked.of(Matmul, block="dense", phase="forward") if i.window]) == 4
