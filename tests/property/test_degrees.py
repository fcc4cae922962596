"""Layers with degrees of their own: the search finds what trying everything finds, changes cost what they send, one engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise, product

import numpy as np
import pytest

from planner import TrainWorkload, load_cluster, load_model, load_stack
from planner.costs.overlap import uniform_bucket_exposure_s
from planner.costs.resharding import reshard_bytes
from planner.errors import Infeasible
from planner.errors import Problem as Fault
from planner.export.launchers import launcher
from planner.ledger import Collective
from planner.pipeline.place import Place
from planner.pipeline.transition import communicators, meets, transition, transition_s
from planner.solve.mixed.ground import Ground
from planner.solve.mixed.search import MixedSearch, search_mixed
from planner.solve.named import examine
from planner.specs.model import Attention, Block, Mlp
from planner.specs.problem import Problem
from tests.property.small_problem import ALL_OR_NOTHING, small_problem

_CLOSED = {"zero_stage": "1", "activation_offload": "none"}


def small(cluster: str, layers: int = 4, reserve: float = 0.0, batch: int = 8, **fixed: str) -> Problem:
    """Tensor and data degrees are open, and whether a layer is recomputed."""
    closed = {**_CLOSED, **fixed}
    return small_problem(cluster, layers, reserve=reserve, batch=batch, forbidden=ALL_OR_NOTHING, **closed)


def found(problem: Problem, *, mixing: bool = True) -> MixedSearch:
    run = MixedSearch(problem, 1e9, "brute", mixing=mixing)
    run.go()
    return run


def places(problem: Problem) -> list[Place]:
    """Every way to cut a stage with some number of micro-batches and devices."""
    members = Ground(problem, None).groups[0]
    return [
        members.option(member, 2).place
        for some in members.classes.values()
        for member in some
        if members.option(member, 2) is not None
    ]


# -- everything is tried ---------------------------------------------------------------------------------------------


def anything(chosen) -> bool:
    """Whether a launcher runs what embedding, layers and head were given, each a way to cut it and the number of a strategy."""
    return True


def everything(problem: Problem, runs=anything) -> float:
    """The best step of one stage: degrees and recomputation of every layer, in every order, and of both ends; what fits only."""
    members = Ground(problem, None).groups[0]
    best = np.inf
    for (_, m, ranks), some in members.classes.items():
        options = [members.option(member, 1) for member in some]
        valid = [option for option in options if option is not None]
        if ranks == problem.cluster.devices:
            for one, other in combinations_with_replacement(valid, 2):
                if one is other or meets(one.place, other.place):
                    best = min(best, of_two(problem, members, m, one, other, runs))
    return best


def of_two(problem: Problem, members, m: int, one, other, runs) -> float:
    """The best of all orders of layers of two members."""
    stack, pricer = problem.stack, members.uniform.pricer
    change_s, pieces = (0.0, 0.0), 0.0
    if one is not other:
        ledger = transition(one.place, other.place)
        seconds = dict.fromkeys(("forward", "backward"), 0.0)
        for item, price in zip(ledger.items, pricer.prices(ledger.items, ledger.axes), strict=True):
            if isinstance(item, Collective):
                seconds[item.phase] += float(np.ravel(price)[0])
            else:
                pieces += float(np.ravel(ledger.axes[item.size])[0]) * item.bytes_per_element
        change_s = seconds["forward"], seconds["backward"]
    ways = []  # (member, strategy): recompute nothing or all
    for option in dict.fromkeys((one, other)):
        strategies = range(len(option.mesh.branches))
        ways += [(option, s) for s in strategies if names_of(option, s) in ("none", "full")]
    best = np.inf
    layers = len(members.uniform.order)
    for chosen in product(ways, repeat=layers + 2):
        if any(names_of(option, s) == "full" for option, s in (chosen[0], chosen[-1])):
            continue  # an end has nothing to recompute
        if not runs(chosen):
            continue
        columns = [(chosen[0], -3), *((way, 0) for way in chosen[1:-1]), (chosen[-1], -2)]
        changes = [a[0] for a, b in pairwise(chosen) if a[0] is not b[0]]
        # To the second way and back send the same, activations one way and gradients the other.
        there = sum(option is one for option in changes)
        back = len(changes) - there
        forward_s = there * change_s[0] + back * change_s[1]
        backward_s = there * change_s[1] + back * change_s[0]

        def total(name: str, columns=columns) -> float:
            return float(sum(option.mesh[name][s, kind] for (option, s), kind in columns))

        transient = max(
            option.mesh["block_bytes"][s, kind] + option.mesh["recomputed_bytes"][s, kind]
            for (option, s), kind in columns
        )
        transient = max(transient, pieces) if changes else transient
        passes = (1.0 + stack.fragmentation.value) * (total("saved_bytes") + transient)
        used = list(dict.fromkeys(option.place for option, _ in chosen))
        idle = stack.framework_bytes.value + stack.communicator_bytes.value * communicators(used)
        if total("always_bytes") + max(passes, total("step_bytes")) + idle > problem.memory_budget_bytes:
            continue
        forward_s += total("forward_s")
        backward_s += total("backward_s") + total("weight_s") + total("recompute_s")
        best = min(best, m * (forward_s + backward_s) + tail_s(total, forward_s, backward_s))
    return best


def names_of(option, s: int) -> str:
    return option.choices(s)["recompute"].value


def tail_s(total, forward_s: float, backward_s: float) -> float:
    """The update, and what backward and forward do not hide of gradients and weights: all but the last of equal messages."""
    exposed = total("main_step_s")
    for track, beside in (("gradients", backward_s), ("weights", forward_s)):
        messages = max(total(f"{track}_messages"), 1.0)
        exposed += float(uniform_bucket_exposure_s(total(f"{track}_step_s"), beside, messages))
    return exposed


@pytest.mark.parametrize("reserve", [0.0, 0.55, 0.62, 0.66, 0.7, 0.74])
@pytest.mark.parametrize("device", ["rtx-4090:1x2", "rtx-4090:2x2", "l4:1x2"])
def test_the_search_finds_what_trying_everything_finds(device, reserve):
    problem = small(device, layers=3, reserve=reserve, pp="1")
    run, best_s = found(problem), everything(problem)
    if run.best is None:
        assert best_s == np.inf
        return
    assert run.best_s == pytest.approx(best_s, rel=1e-9)
    assert run.finished().bound_s <= best_s * (1.0 + 1e-12)


def galvatron_runs(chosen) -> bool:
    """What Galvatron's files can say (PKU-DAIR/Hetu-Galvatron, ``hybrid_parallel_config.py``): ``default_dp_type`` is one of ddp
    and zero2, and ``dp_types_enc`` makes any layer zero3; ``vtp``, ``vsp`` and ``embed_sdp`` are of both ends; a layer whose
    ``use_sp`` is set runs Ulysses, which as ``--sequence-parallel`` needs all tensor-parallel layers to share the sequence."""
    places = [option.place for option, _ in chosen]
    states = [option.choices(s)["zero_stage"].value for option, s in chosen]
    degrees = [(place.row["tp"], place.row["cp"]) for place in places]
    flags = {place.recipe["sequence_parallel"].value for place in places if place.row["tp"] > 1}
    ulysses = any(cp > 1 for _, cp in degrees)
    return (
        len({*states} - {"3"}) <= 1
        and (degrees[0], states[0]) == (degrees[-1], states[-1])
        and len(flags | ({"true"} if ulysses else set())) <= 1
    )


@pytest.mark.parametrize("reserve", [0.0, 0.66, 0.7, 0.74])
@pytest.mark.parametrize("state", ["0", "3", None])
def test_the_search_for_galvatron_finds_what_trying_everything_that_it_runs_finds(state, reserve):
    """Of one state, to the last digit. Of several, a step of one micro-batch that is little more than its gradients' way may be
    missed by what a last message of few is longer than one of many; the bound holds."""
    fixed = {"gradient_accumulation": "fused", "loss_kernel": "fused", "context": "a2a", "pp": "1"}
    fixed |= {} if state is None else {"zero_stage": state}
    problem = small("rtx-4090:1x2", layers=2, reserve=reserve)
    kept = {slot: problem.fixed[slot] for slot in ("tensor_overlap", "zero_group")}
    problem = replace(
        problem,
        fixed={**kept, **fixed},
        forbidden=(*ALL_OR_NOTHING, "*_offload"),
        launcher=launcher("galvatron"),
    )
    found = search_mixed(problem, 1, base=none_fits, mixing=True, solver="brute")
    best_s, step_s = everything(problem, galvatron_runs), found.best.estimate.step_time_s
    few_messages = state is None and reserve == 0.0
    assert step_s == pytest.approx(best_s, rel=1e-2 if few_messages else 1e-9)
    assert found.mixed["bound_s"] <= best_s * (1.0 + 1e-12)


def test_a_plan_with_more_memory_is_not_slower():
    """Every plan that fits in less memory fits in more: what is found beside the fastest stages keeps to that, where the fastest
    strategies of a stage change with every layer that fits."""
    steps_s = []
    for reserve in (0.0, 0.05, 0.08, 0.1, 0.12):
        fixed = {"pp": "2", "cp": "1", "zero_stage": "0"}
        problem = Problem(
            load_model("llama2-7b"), load_cluster("a100-sxm-40gb:4x2"), TrainWorkload(16, 2048), load_stack(),
            reserve=reserve, fixed=fixed, launcher=launcher("galvatron"),
        )  # fmt: skip
        steps_s.append(search_mixed(problem, 1, mixing=True).best.estimate.step_time_s)
    assert steps_s == sorted(steps_s)
    assert steps_s[0] < steps_s[-1]


def test_a_plan_may_need_layers_of_other_degrees():
    """Two nodes with slow network: the ends over four ranks spare their gradients' way, layers over one spare activations'."""
    problem = small("rtx-4090:2x2", layers=3, pp="1")
    mixed, alike = found(problem), found(problem, mixing=False)
    assert mixed.best_s < 0.8 * alike.best_s
    assert mixed.best_s == pytest.approx(everything(problem), rel=1e-9)


# -- the engine prices everything ------------------------------------------------------------------------------------


def wide() -> Problem:
    """Eight layers of Llama 2 13B's width on four devices, whose memory is nearly too small for two of them per layer."""
    problem = small("rtx-4090:1x4", layers=8, reserve=0.1, batch=32)
    block = Block(attention=Attention(40, 40, 128), mlp=Mlp(13824, gated=True))
    model = replace(problem.model, name="wide", hidden=5120, blocks={"decoder": block})
    fixed = {
        name: value for name, value in problem.fixed.items() if name not in ("zero_stage", "tensor_overlap")
    }
    return replace(problem, model=model, fixed=fixed)


TIGHT = wide()


def planned(problem: Problem):
    """The best plan with degrees of every layer, and what it is priced at anew from its JSON fields."""
    plan = search_mixed(problem, 1, mixing=True).best
    fixed = {name: str(value).lower() for name, value in {**plan.knobs, **plan.mesh}.items()}
    return plan, examine(replace(problem, fixed=fixed, forbidden=(), layerwise=plan.layerwise))


def test_layers_are_priced_as_in_a_plan_that_has_their_degrees_throughout():
    """Decision 3: columns of the table add up; a layer's column is that of the uniform plan with its degrees and choices."""
    plan, again = planned(TIGHT)
    assert again.plan.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-9)
    assert plan.estimate.fits
    meshes = [{**place["mesh"], "micro_batch_size": place["micro_batch_size"]} for place in plan.places]
    assert len({tuple(mesh.items()) for mesh in meshes}) > 1, "degrees differ"
    assert len({mesh["dp"] * mesh["micro_batch_size"] for mesh in meshes}) == 1, "the same micro-batches"
    compared = 0
    for number, (strategy, at) in enumerate(
        zip(plan.layerwise["strategies"], plan.layerwise["at"], strict=True)
    ):
        if not any(s == number for runs in plan.layerwise["stages"] for s, _ in runs):
            continue
        fixed = {
            **meshes[at],
            **plan.places[at]["choices"],
            **strategy,
            "pp": plan.mesh["pp"],
            "schedule": "1f1b",
        }
        alone = examine(
            replace(TIGHT, fixed={k: str(v).lower() for k, v in fixed.items()}, forbidden=())
        ).table
        here = again.table.kinds.index(f"decoder·{chr(ord('A') + number)}")
        there = alone.kinds.index("decoder")
        assert again.table.values[:, here] == pytest.approx(alone.values[:, there], rel=1e-9)
        compared += 1
    assert compared


def test_seconds_and_changes_add_up():
    plan, again = planned(TIGHT)
    changes = [name for name in again.table.kinds if name.startswith("change")]
    assert changes
    assert plan.estimate.breakdown_s["resharding"] > 0.0
    assert sum(plan.estimate.breakdown_s.values()) == pytest.approx(plan.estimate.step_time_s, rel=1e-9)
    assert sum(plan.stages) == 8, "a change is no layer"


def test_the_answer_is_never_worse_and_its_bound_holds():
    for problem in (TIGHT, small("l4:2x2", layers=6, reserve=0.68, batch=16)):
        alike, stage, layer = (
            search_mixed(problem, 1, mixing=False, base=search_alike).best,
            search_mixed(problem, 1, mixing=False).best,
            search_mixed(problem, 1, mixing=True).best,
        )
        assert layer.estimate.step_time_s <= alike.estimate.step_time_s * (1.0 + 1e-9)
        assert layer.optimality.bound_s <= min(stage.estimate.step_time_s, layer.estimate.step_time_s)


def search_alike(problem: Problem, top: int, on_progress, time_limit_s: float):
    from planner.solve.train import search

    return search(problem, top, on_progress)


# -- what a change costs ---------------------------------------------------------------------------------------------


def of_degrees(problem: Problem, tp: int, *, sharded: bool) -> Place:
    wanted = "true" if sharded else "false"
    return next(
        p for p in places(problem)
        if p.row["tp"] == tp and p.ranks == 4 and p.micro_batches == 2 and p.recipe["sequence_parallel"].value == wanted
    )  # fmt: skip


def test_a_change_sends_what_the_boxing_table_says():
    """OneFlow's Table 2 (arXiv:2110.15032): split to another split is an all-to-all of (G − 1)/G² of the tensor per rank; split
    to whole an all-gather of (G − 1)/G, and back nothing."""
    problem = small("a100-sxm-80gb:1x4")
    elements = 4 * 4096 * 2048.0  # of a micro-batch on all ranks: four sequences

    def sent(one: Place, other: Place) -> list[tuple[str, str, float, float]]:
        ledger = transition(one, other)
        return [
            (item.phase, item.kind, float(item.group.size[0]), float(np.ravel(ledger.axes[item.size])[0]))
            for item in ledger.of(Collective)
        ]

    one, two, four = (of_degrees(problem, tp, sharded=tp > 1) for tp in (1, 2, 4))
    assert sent(one, two) == [
        ("forward", "all_to_all", 2.0, elements / 4),
        ("backward", "all_to_all", 2.0, elements / 4),
    ]
    assert (
        reshard_bytes("batch", "sequence", elements / 2, 2) == elements / 4 / 2
    )  # half of what a rank holds
    whole = of_degrees(problem, 2, sharded=False)
    assert sent(one, whole) == [("forward", "all_gather", 2.0, elements / 2)]
    assert sent(whole, one) == [("backward", "all_gather", 2.0, elements / 2)]
    assert [kind for _, kind, *_ in sent(two, four)] == ["all_to_all"] * 2
    assert sent(two, two) == []


def test_changes_cost_the_same_either_way():
    """So that layers of either of two ways stand together: every order has a change at least, and one suffices."""
    for cluster in ("a100-sxm-80gb:1x4", "rtx-4090:2x2"):
        problem = small(cluster)
        pricer = Ground(problem, None).groups[0].uniform.pricer
        some = [place for place in places(problem) if place.ranks == 4 and place.micro_batches == 2]
        cost = np.array([[transition_s(one, other, pricer) for other in some] for one in some])
        assert len(some) > 3
        assert cost == pytest.approx(cost.T, rel=1e-12)
        assert np.all((cost > 0.0) | (np.diag(np.ones(len(some))) > 0.0))


def test_degrees_that_do_not_refine_each_other_are_no_neighbours():
    problem = small("a100-sxm-80gb:1x4")
    two = of_degrees(problem, 2, sharded=False)
    three = replace(two, row={**two.row, "tp": 3.0, "dp": 4.0 / 3.0})
    assert not meets(two, three)
    assert meets(two, of_degrees(problem, 4, sharded=False))


def test_groups_of_a_stage_are_counted_once():
    """Tensor and data groups of either way, and the pairs between which a change sends."""
    problem = small("a100-sxm-80gb:1x4")
    one, two = of_degrees(problem, 1, sharded=False), of_degrees(problem, 2, sharded=True)
    pipeline = 1  # of the two stages that these places are made for
    assert communicators([one]) == 1 + pipeline  # dp 4
    assert communicators([two]) == 2 + pipeline  # tp 2, dp 2
    assert communicators([one, two]) == communicators([one, two, one]) == 4 + pipeline


def test_ends_that_share_weights_are_priced_on_the_network_between_them():
    """In two stages embedding and head stand in one node, in four in two: what exchanging their gradients costs is found anew."""
    fixed = {"tp": "1", "cp": "1", "pp": "4", "sequence_parallel": "false", "tensor_overlap": "none"}
    problem = Problem(
        load_model("opt-1.3b"), load_cluster("rtx-4090:2x2"), TrainWorkload(16, 2048), load_stack(), fixed=fixed, reserve=0.5,
        forbidden=("*_offload",),
    )  # fmt: skip
    run = MixedSearch(problem, 1e9, "auto")
    run.go()
    plan = search_mixed(problem, 1, base=none_fits).best
    assert plan.estimate.step_time_s == pytest.approx(run.best.step_s, rel=1e-9)


def none_fits(problem: Problem, top: int, on_progress, time_limit_s: float):
    raise Infeasible(Fault("test", "treats layers alike"))
