"""Bubble rates of Zero Bubble's schedules at profiled durations: Qi et al. 2024 (arXiv:2401.10241), Tables 5 and 9."""

from dataclasses import replace

import numpy as np
import pytest

from planner.schedule.engine import simulate
from planner.schedule.memory import in_flight
from planner.schedule.order import Op, make_order
from planner.techniques.training.schedule.zbv_controllable import V_MIN
from planner.techniques.training.schedule.zero_bubble import H1, H2
from planner.techniques.training.schedule.zero_bubble_auto import NOMINAL, Durations, automatic

ROWS = [  # p, m; F, B, W and message in milliseconds; rates of 1F1B, ZB-H1, ZB-H2, ZB-1p, ZB-2p
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083, 0.1585, 0.0433),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837, 0.1242, 0.0039),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444, 0.0674, 0.0026),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698, 0.1323, 0.0029),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045, 0.0559, 0.1045, 0.0022),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554, 0.0294, 0.0554, 0.0010),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672, 0.1397, 0.0066),
    (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088, 0.0516, 0.1088, 0.0054),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576, 0.0266, 0.0576, 0.0028),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421, 0.0641, 0.1421, 0.0038),
    (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106, 0.0490, 0.1106, 0.0029),
    (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594, 0.0257, 0.0594, 0.0018),
]


def rate(order, durations):
    p, m = order.shape.p, order.shape.m
    line = simulate(order, *([seconds] * p for seconds in durations.of), hop_s=durations.hop_s)
    span_s = float((line.last_end_s - line.first_start_s).max())
    return 1.0 - m * sum(durations.of) / span_s


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"p={row[0]}-m={row[1]}-{row[2]}ms")
def test_bubble_rates_are_those_of_table_5(row):
    p, m, *rest = row
    durations = Durations(*(1e-3 * ms for ms in rest[:4]))
    made_for = [automatic("1p", 1.0, durations), automatic("2p", 2.0, durations)]
    for generator, published in zip(["1f1b", H1, H2, *made_for], rest[4:], strict=True):
        found = rate(make_order(generator, p, m), durations)
        assert found == pytest.approx(published, abs=6e-5)  # printed to four digits
    for generator, limit in zip(made_for, (1, 2), strict=True):
        assert in_flight(make_order(generator, p, m), Op.B).max() <= limit * p


@pytest.mark.parametrize("limit", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    "times", [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (1.0, 1.4, 0.6), (1.0, 1.2, 0.4), (1.0, 1.8, 0.9)]
)
def test_an_order_made_for_other_durations_loses_little(limit, times):
    """Against the order made for a plan's own durations, at which both are priced."""
    own = Durations(*times, 0.02)
    kept, fitted = (
        rate(make_order(automatic("order", limit, made_for), 8, 24), own) for made_for in (NOMINAL, own)
    )
    assert kept <= fitted + 0.015


def _v_min_of_its_authors(shape, device):
    """A device's order in github.com/sail-sg/zero-bubble-pipeline-parallelism, scheduler/zbv_greedy.py: micro-batches six slots
    apart, one slot from device to device in each sweep, two more before backwards where the devices are a multiple of three;
    a weight gradient in every slot that is left, those of the second chunk first."""
    p, m, gap = shape.p, shape.m, 2 if shape.p % 3 == 0 else 0
    stages = device, 2 * p - 1 - device
    first = (device, 2 * p - 1 - device, 2 * p + gap + device, 4 * p + gap - device - 1)
    passes = [(Op.F, stages[0]), (Op.F, stages[1]), (Op.B, stages[1]), (Op.B, stages[0])]
    at = {slot + 6 * k: (*of, k) for slot, of in zip(first, passes, strict=True) for k in range(m)}
    ops, waiting = [], {stages[1]: [], stages[0]: []}
    for slot in range(max(at) + 1 + 2 * m):
        if slot in at:
            op, stage, k = at[slot]
            ops.append((int(op), stage, k))
            if op == Op.B:
                waiting[stage].append(k)
        elif left := [stage for stage, ks in waiting.items() if ks]:
            ops.append((int(Op.W), left[0], waiting[left[0]].pop(0)))
    return tuple(np.array(ops).T)


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (1.0, 1.4, 0.6), (1.0, 1.3, 1.3)])
@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
def test_v_min_idles_as_its_authors_order_does_where_passes_take_unlike_times(times, p, m):
    theirs = replace(V_MIN, name="theirs", device_ops=_v_min_of_its_authors)
    each = [np.full(2 * p, seconds / 2) for seconds in times]
    ours_s, theirs_s = (
        simulate(make_order(order, p, m, 2), *each).last_end_s.max() for order in (V_MIN, theirs)
    )
    assert ours_s == pytest.approx(theirs_s)
