"""Schedules that keep several copies of the weights, and what shards them."""

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
from planner.errors import InvalidPlan
from planner.solve.named import estimate

# Copies per device: Chimera and DualPipe hold two stages (arXiv:2107.06925, section 3.1; arXiv:2412.19437, Table 2), AvgPipe two
# replicas, PipeDream p versions and PipeDream-2BW two (arXiv:2006.09503, section 2).
SEVERAL = ("chimera", "chimera_doubling", "dualpipe", "mixpipe", "avgpipe", "pipedream", "2bw")
ONE = ("1f1b", "interleaved", "zb_h1", "dualpipev")


def plan(schedule, zero_stage, pp=4):
    return estimate(
        Problem(
            load_model("llama3-8b"), load_cluster("h100-sxm:2x8"), TrainWorkload(64, 2048), load_stack(),
            fixed={"schedule": schedule, "pp": pp, "zero_stage": zero_stage}, allowed=("staleness",),
        )
    )  # fmt: skip


@pytest.mark.parametrize("schedule", SEVERAL)
@pytest.mark.parametrize("zero_stage", ["3", "fsdp"])
def test_weights_of_which_there_are_several_cannot_be_sharded(schedule, zero_stage):
    with pytest.raises(InvalidPlan, match="several copies of the weights"):
        plan(schedule, zero_stage)


@pytest.mark.parametrize("schedule", SEVERAL)
def test_their_states_can(schedule):
    assert plan(schedule, "1").knobs["zero_stage"] == 1


@pytest.mark.parametrize("schedule", ONE)
def test_one_copy_can_be_sharded(schedule):
    assert plan(schedule, "3").knobs["zero_stage"] == 3


def test_the_rule_is_about_pipelines():
    assert plan("pipedream", "3", pp=1).mesh["pp"] == 1
