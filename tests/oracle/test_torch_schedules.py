"""Do devices run what PyTorch's own schedules of the same name make them run? Operation by operation, for every rank."""

from types import SimpleNamespace

import pytest

from planner.export.torchtitan import SCHEDULES
from planner.schedule.order import ORDERS, Op, Shape
from planner.techniques.training.schedule import breadth_first
from planner.techniques.training.schedule.dualpipe import IN_A_V

pytestmark = pytest.mark.oracle


def theirs(order, shape, rank):
    """(operation, virtual stage, micro-batch) in PyTorch's order; pairs of a forward and a backward one after another."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    asked = SimpleNamespace(
        pp_group_size=shape.p, _n_microbatches=shape.m, _stages=[None] * shape.v, n_local_stages=shape.v, rank=rank,
        number_of_rounds=shape.m // shape.p, microbatches_per_round=shape.p,
    )  # fmt: skip
    kinds = {
        schedules.FORWARD: (Op.F,),
        schedules.BACKWARD_INPUT: (Op.B,),
        schedules.BACKWARD_WEIGHT: (Op.W,),
    }
    kinds[schedules.FULL_BACKWARD] = (Op.B, Op.W) if order.splits_backward else (Op.B,)
    found = getattr(schedules, f"Schedule{SCHEDULES[order.name]}")._calculate_single_rank_operations(
        asked, rank
    )
    whole = [part for action in found if action for part in action.sub_actions or (action,)]
    return [
        (kind, action.stage_index, action.microbatch_index)
        for action in whole
        for kind in kinds[action.computation_type]
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize(
    ("order", "v"),
    [(ORDERS["interleaved"], 2), (ORDERS["interleaved"], 3), (breadth_first.ORDER, 3), (IN_A_V, 2)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_torchtitan_runs_the_order_that_is_priced(order, v, p):
    for m in (2 * p, 4 * p):
        for rank in range(p):
            shape = Shape(p, m, v, p)
            ours = [
                (Op(kind), stage, k) for kind, stage, k in zip(*order.device_ops(shape, rank), strict=True)
            ]
            if (
                order is breadth_first.ORDER
            ):  # backwards from the last micro-batch to the first: all are alike
                ours = [(kind, stage, k if kind == Op.F else m - 1 - k) for kind, stage, k in ours]
            assert ours == theirs(order, shape, rank)
