"""Every kind of schedule is what the search chooses where its paper says that it should win, all of them open.

Schedules trade memory for bubbles, and the problems are chosen by what has room as it is predicted: at any risk that it has not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search
from planner.plans.holdings import holdings
from planner.report.account import second_tree
from planner.solve.named import examine
from planner.solve.replay import replay
from planner.technique import discover

# Eight stages in one node, micro-batches of one sequence; what is left to choose is the schedule and how layers are dealt.
ELSE = {
    "tp": 1, "cp": 1, "pp": 8, "micro_batch_size": 1, "zero_stage": 1, "recompute": "none", "optimizer_offload": "none",
    "activation_offload": "none", "parameter_offload": "none", "attention_kernel": "flash", "elementwise_kernel": "fused",
    "loss_kernel": "fused", "gradient_accumulation": "fused", "context": "p2p", "zero_group": "full",
}  # fmt: skip

ELSEWHERE = tuple(
    f"schedule={name}"
    for name in (
        "zbv",
        "zb_h2",
        "zb_h1",
        "v_half",
        "dualpipe",
        "chimera",
        "chimera_doubling",
        "*_vocab",
        "zb_*p",
    )
)
SPLIT = tuple(f"schedule={name}" for name in ("zb*", "v_*", "dualpipe*", "*_vocab", "ooo"))
UNSPLIT = (*SPLIT, "schedule=interleaved", "schedule=breadth_first")


@dataclass(frozen=True)
class Case:
    """A problem, and the schedule that wins it."""

    schedule: str
    model: str
    cluster: str
    batch: int
    seq: int
    allowed: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = (
        "schedule=*_vocab",
    )  # where ends cannot be shared, but for the cases that are about that


ONE_CHUNK = (
    "schedule=*_vocab",
    "schedule=chimera*",
    "schedule=mixpipe",
    "schedule=dualpipe*",
    "schedule=*v*",
    "schedule=v_*",
)
CASES = [
    # Few micro-batches: arXiv:2107.06925, section 4, is about N = D; two copies of the weights fit.
    Case("chimera", "llama3-8b", "a100-sxm-80gb:1x8", 8, 4096),
    # Twice as many, and room for twice the activations.
    Case("chimera_doubling", "gpt3-1.3b", "a100-sxm-40gb:1x8", 16, 2048),
    # Memory to spare for 2p − 1 micro-batches, none for a second copy: arXiv:2401.10241, section 4.
    Case("zb_h2", "gpt3-6.7b", "a100-sxm-40gb:1x8", 32, 2048),
    # No room for more than 1F1B's activations: arXiv:2401.10241, section 6 and its V schedule.
    Case("zbv", "llama-7b", "a100-sxm-40gb:1x8", 32, 4096),
    # Room for about half of them: arXiv:2405.15362.
    Case("v_half", "gpt3-6.7b", "a100-sxm-40gb:1x8", 32, 4096),
    # Many micro-batches, and two copies that fit: arXiv:2412.19437.
    Case("dualpipe", "gpt3-13b", "a100-sxm-80gb:1x8", 64, 2048),
    # Fewer micro-batches than stages, too few for chunks to pay their messages.
    Case("zb_h1", "gpt2-xl", "a100-sxm-40gb:1x8", 2, 1024),
    # Few micro-batches of long sequences: the first stages hold too much, the last ones little (Kim et al., ICML 2023).
    Case("bpipe", "gpt3-13b", "a100-sxm-80gb:1x8", 8, 8192),
    # As many micro-batches as stages, memory for all of them (arXiv:2211.05953); interleaved 1F1B then takes just as long.
    Case(
        "breadth_first",
        "gpt3-6.7b",
        "a100-sxm-40gb:1x8",
        8,
        4096,
        forbidden=("schedule=*_vocab", "schedule=interleaved"),
    ),
    # Two rounds of micro-batches, where a pipeline in both directions has no room: arXiv:2104.04473, section 2.2.
    Case("interleaved", "gpt3-13b", "a100-sxm-80gb:1x8", 16, 4096),
    # Without schedules that need their authors' runtimes: weight gradients behind the others alone, and the V of both directions.
    Case("ooo", "gpt3-6.7b", "a100-sxm-40gb:1x8", 4, 1024, forbidden=ELSEWHERE),
    Case("dualpipev", "gpt3-6.7b", "a100-sxm-40gb:1x8", 16, 1024, forbidden=ELSEWHERE),
    # No flush at all, where late gradients are allowed: arXiv:2006.09503; with fewer micro-batches than stages, which
    # PipeDream-2BW cannot run: doi:10.1145/3341301.3359646.
    Case("2bw", "gpt3-6.7b", "a100-sxm-40gb:1x8", 32, 4096, ("staleness",)),
    Case("pipedream", "gpt2-xl", "a100-sxm-80gb:1x8", 2, 8192, ("staleness",)),
    # Room for a third of 1F1B's activations: arXiv:2405.15362.
    Case("v_min", "gpt3-6.7b", "a100-sxm-40gb:1x8", 32, 6144),
    # A slow network between the stages: 1F1B's alternation waits for the message there and back, all forwards in a row do not;
    # with as few micro-batches as stages nothing alternates, and 1F1B holds less (arXiv:1811.06965, arXiv:2007.01045).
    Case("gpipe", "gpt3-2.7b", "examples/slow_network.toml", 16, 2048),
    Case("1f1b", "gpt3-2.7b", "examples/slow_network.toml", 8, 2048),
    # Without schedules that split the backward, and without room for forward doubling: between Chimera and it (DAC 2023).
    Case("mixpipe", "gpt3-2.7b", "a100-sxm-40gb:1x8", 32, 5120, forbidden=SPLIT),
    # What its paper compares it with, where a second copy of the weights does not fit: arXiv:2308.15762, section 2.
    Case("hanayo", "gpt3-6.7b", "a100-sxm-40gb:1x8", 8, 2048, forbidden=UNSPLIT),
    # A large vocabulary at the end of few layers: arXiv:2411.05288, section 6, V-Half and 1F1B.
    Case("v_half_vocab", "llama3-8b", "a100-sxm-80gb:1x8", 32, 4096, forbidden=()),
    Case("1f1b_vocab", "llama3-8b", "a100-sxm-80gb:1x8", 64, 2048, forbidden=("schedule=v_half_vocab",)),
    # One chunk per device. No room for more than 1F1B's activations: arXiv:2401.10241, section 5.3, ZB-1p; or for half as many
    # again, where weight gradients are shorter than the rest.
    Case("zb_1p", "gpt3-6.7b", "a100-sxm-40gb:1x8", 32, 2560, forbidden=ONE_CHUNK),
    Case("zb_1.5p", "gpt3-1.3b", "a100-sxm-80gb:1x8", 32, 8192, forbidden=ONE_CHUNK),
    # Attention that is longer than all products with weights, and room for twice as many: section 5.3, ZB-2p against ZB-H2.
    Case("zb_2p", "gpt3-1.3b", "b200-sxm:1x8", 32, 16384, forbidden=ONE_CHUNK),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.schedule)
def test_the_search_chooses_it_where_it_wins(case):
    cluster = replace(load_cluster(case.cluster), name=case.cluster)
    problem = Problem(
        load_model(case.model), cluster, TrainWorkload(case.batch, case.seq), load_stack(), fixed=ELSE,
        explore=("schedule=*",), allowed=case.allowed, forbidden=case.forbidden,
        max_oom_risk=1.0,
    )  # fmt: skip
    found = search(problem, top=2)
    assert found.best.knobs["schedule"] == case.schedule
    assert found.best.optimality.status == "exact"
    bubbles = [
        leaf for group in second_tree(examine(replay(found.best)))["children"] for leaf in group["items"]
    ]
    assert sum(leaf["seconds"] for leaf in bubbles) == pytest.approx(found.best.estimate.step_time_s)


@pytest.mark.parametrize(
    "schedule", sorted({choice for t in discover().values() if t.slot == "schedule" for choice in t.choices})
)
def test_seconds_and_bytes_add_up_under_every_schedule(schedule):
    fixed = {"schedule": schedule, "pp": 4, "tp": 2, "recompute": "block", "recompute_layers": 2}
    problem = Problem(
        load_model("llama3-8b"), load_cluster("a100-sxm-80gb:2x8"), TrainWorkload(64, 2048), load_stack(), fixed=fixed,
        allowed=("staleness",),
    )  # fmt: skip
    assembly = examine(problem)
    estimate = assembly.plan.estimate
    assert sum(estimate.breakdown_s.values()) == pytest.approx(estimate.step_time_s)
    assert estimate.breakdown_s.get("pipeline_bubble", 0.0) >= -1e-9
    held = defaultdict(float)
    for holding in holdings(assembly):
        held[holding.pool] += holding.n_bytes
    for pool, n_bytes in estimate.memory_bytes.items():
        if pool != "peak":
            assert held[pool] == pytest.approx(n_bytes)
