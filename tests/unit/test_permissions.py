"""What changes the result of training is never chosen without being allowed, and the plan says that it was."""

import json
from dataclasses import replace

import pytest

from planner import Problem, SpecError, TrainWorkload, examine, load_cluster, load_model, load_stack, search
from planner.cli import main
from planner.plans.plan import Plan
from planner.solve.replay import replay
from planner.technique import discover

# Two nodes behind a slow network: gradients are what takes time.
NETWORK = "examples/slow_network.toml"
SLOW = Problem(
    load_model("gpt3-1.3b"), replace(load_cluster(NETWORK), name=NETWORK), TrainWorkload(32, 2048), load_stack(),
    fixed={"tp": 1, "pp": 1, "cp": 1, "micro_batch_size": 1},
)  # fmt: skip
NEEDING = [(t, choice) for t in discover().values() if t.needs for choice in t.choices]


@pytest.mark.parametrize(("technique", "choice"), NEEDING, ids=[choice for _, choice in NEEDING])
def test_a_fixed_choice_is_no_permission(technique, choice):
    problem = replace(SLOW, fixed={**SLOW.fixed, technique.slot: choice})
    with pytest.raises(SpecError, match=f"--allow {technique.needs[0]}"):
        search(problem)


@pytest.mark.parametrize(
    ("allowed", "needs"), [((), ()), (("staleness",), ("staleness",)), (("lossy",), ("lossy",))]
)
def test_what_is_allowed_is_searched_and_written_down(allowed, needs):
    best = search(replace(SLOW, allowed=allowed), top=1).best
    assert best.permissions == needs
    again = Plan.from_dict(json.loads(json.dumps(best.as_dict())))
    assert again.permissions == needs
    assert examine(replay(again)).plan.estimate.step_time_s == pytest.approx(best.estimate.step_time_s)


def test_a_permission_nobody_needed_is_not_written_down():
    single = replace(SLOW, cluster=load_cluster("a100-sxm-80gb:1x1"), allowed=("staleness", "lossy"))
    assert search(single, top=1).best.permissions == ()


def test_everything_finds_at_least_what_is_likely():
    small = Problem(
        load_model("gpt2"), load_cluster("a100-sxm-80gb:1x2"), TrainWorkload(8, 1024), load_stack(),
        fixed={"context": "p2p", "loss_kernel": "fused"},
    )  # fmt: skip
    likely, everything = search(small, top=1), search(replace(small, explore=("all",)), top=1)
    assert everything.search.candidates > likely.search.candidates
    assert everything.best.estimate.step_time_s <= likely.best.estimate.step_time_s
    assert everything.best.permissions == ()


def test_what_is_left_aside_can_still_be_forbidden():
    small = Problem(
        load_model("gpt2"), load_cluster("a100-sxm-80gb:1x2"), TrainWorkload(8, 1024), load_stack(),
        fixed={"context": "p2p"}, forbidden=("patrickstar",), explore=("all",),
    )  # fmt: skip
    assert search(small, top=1).best.knobs["gradient_accumulation"] == "fused"


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [("--allow", "stalenes", "staleness"), ("--explore", "schedule=zb_h3", "schedule=zb_h1")],
)
def test_unknown_words_are_refused(option, value, hint, capsys):
    job = ["--model", "gpt2", "--cluster", "a100-sxm-80gb:1x1", "--global-batch", "8", "--seq-len", "1024"]
    assert main(["train", *job, option, value]) == 2
    message = capsys.readouterr().err
    assert option in message
    assert hint in message
