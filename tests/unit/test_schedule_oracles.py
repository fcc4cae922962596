"""Schedules against the closed forms of their papers, over more shapes than the figures of their records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.costs import pipeline
from planner.engine.block_table import FIELDS, BlockTable
from planner.pipeline.layout import layouts
from planner.pipeline.step_time import exact_step_s
from planner.schedule.engine import simulate
from planner.schedule.memory import in_flight
from planner.schedule.order import Op, Shape, make_order, repeated
from planner.techniques import figures
from planner.techniques.training.schedule import zbv_controllable
from planner.techniques.training.schedule.bpipe import ORDER as BPIPE
from planner.techniques.training.schedule.breadth_first import ORDER as BREADTH_FIRST
from planner.techniques.training.schedule.chimera import CONCATENATED, DOUBLED
from planner.techniques.training.schedule.dualpipe import BOTH_WAYS, IN_A_V
from planner.techniques.training.schedule.hanayo import ORDER as HANAYO
from planner.techniques.training.schedule.ooo_backprop import ORDER as OUT_OF_ORDER
from planner.techniques.training.schedule.pipedream import ORDER as PIPEDREAM
from planner.techniques.training.schedule.pipedream_2bw import ORDER as TWO_BUFFERED
from planner.techniques.training.schedule.split_backward import hold_weight_inputs
from planner.techniques.training.schedule.zbv_controllable import V_HALF, V_MIN, ZBV, building_block
from planner.techniques.training.schedule.zero_bubble import H1, H2


@pytest.mark.parametrize(("depth", "slots", "double"), [(4, 10, 16), (8, 22, 36), (16, 46, 76)])
def test_chimeras_unit(depth, slots, double):
    # arXiv:2107.06925, Table 2 with N = D: D − 2 idle slots of 2N + D − 2 where both passes take one; with backwards of two,
    # 2(D − 2) forwards of 3N + 2(D − 2).
    assert figures.makespan_s(CONCATENATED, depth, depth, 2, 1.0, 1.0) == slots == 2 * depth + depth - 2
    assert (
        figures.makespan_s(CONCATENATED, depth, depth, 2, 1.0, 2.0) == double == 3 * depth + 2 * (depth - 2)
    )


@pytest.mark.parametrize("units", [1, 2, 4])
def test_chimera_holds_between_half_and_all(units):
    # arXiv:2107.06925, Table 2: (D/2 + 1) to D micro-batches; doubled where two run together (section 3.5).
    expected = [5, 6, 7, 8, 8, 7, 6, 5]
    assert in_flight(make_order(CONCATENATED, 8, 8 * units, 2)).tolist() == expected
    assert in_flight(make_order(DOUBLED, 8, 16 * units, 2)).tolist() == [2 * n for n in expected]


def _as_their_runtime_runs_it(p: int, m: int, device: int, together: int) -> list[tuple[int, int, int]]:
    """A device's (operation, stage, micro-batch) in the authors' runtime, by its loops p1 to p5 (github.com/Shigangli/Chimera,
    chimera/chimera_bert/bert/main_with_runtime_direct.py, and with two together …_forward_doubling.py).

    ``near`` is the direction in whose first half the device stands.
    """
    near, half = int(device >= p // 2), p // 2
    a = half - min(device, p - 1 - device)  # schedule_number_a
    b = half - a  # schedule_number_b; with doubling _c = b + half
    F, B, far = int(Op.F), int(Op.B), 1 - near
    steps: list[tuple[int, int]] = []
    for unit in range(m // (together * p)):
        steps += a * [*([(B, near)] if unit else []), *together * [(F, near)]]
        steps += b * [*together * [(F, far)], *together * [(F, near)]]
        steps += a * [*together * [(F, far)], (B, far)]
        steps += (b + (together - 1) * half) * [(B, near), (B, far)]
    steps += a * [(B, near)]
    done = dict.fromkeys(steps, 0)
    ops = []
    for op, up in steps:
        ops.append((op, up * p + (p - 1 - device if up else device), 2 * done[op, up] + up))
        done[op, up] += 1
    return ops


@pytest.mark.parametrize(("p", "m"), [(4, 4), (4, 16), (8, 8), (8, 32)])
def test_chimera_runs_in_its_authors_order(p, m):
    shape = make_order(CONCATENATED, p, m, 2).shape
    for device in range(p):
        ours = np.array(CONCATENATED.device_ops(shape, device)).T.tolist()
        assert [*map(tuple, ours)] == _as_their_runtime_runs_it(p, m, device, 1)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 32)])
@pytest.mark.parametrize("backward_s", [1.0, 2.0, 3.0])
def test_doubling_is_as_fast_as_its_authors_order(p, m, backward_s):
    def device_ops(shape, device):
        return tuple(np.array(_as_their_runtime_runs_it(p, m, device, 2)).T)

    theirs = replace(DOUBLED, name="theirs", device_ops=device_ops)
    times = [figures.makespan_s(order, p, m, 2, 1.0, backward_s) for order in (DOUBLED, theirs)]
    assert times[0] == times[1]
    assert (
        in_flight(make_order(theirs, p, m, 2)).max() == in_flight(make_order(DOUBLED, p, m, 2)).max() == 2 * p
    )


def test_doubling_closes_the_gaps_between_units():
    # Li, Hoefler 2021, section 3.5: with backwards twice as long, concatenated units leave gaps that doubled ones do not.
    gaps = [figures.bubble_s(CONCATENATED, 8, 16 * units, 2) for units in (1, 2, 4)]
    closed = [figures.bubble_s(DOUBLED, 8, 16 * units, 2) for units in (1, 2, 4)]
    assert gaps == sorted(set(gaps))
    assert len(set(closed)) == 1
    assert closed[0] < gaps[0]


@pytest.mark.parametrize(("waves", "ratio"), [(2, 14 / 55), (4, 14 / 103), (8, 14 / 199)])
def test_hanayos_waves(waves, ratio):
    # arXiv:2308.15762, section 3.4: (2P − 2)/(3PW + P − 1) at P = 8; a work-conserving unit comes within 7 %.
    found = figures.bubble_s(HANAYO, 8, 8, 2 * waves) / figures.makespan_s(HANAYO, 8, 8, 2 * waves)
    assert found == pytest.approx(ratio, rel=0.07)
    assert in_flight(make_order(HANAYO, 8, 24, 2 * waves)).max() <= 8 * 2 * waves


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 20), (8, 64), (16, 40)])
@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.0), (1.0, 1.0, 0.5), (2.0, 2.0, 1.0)])
def test_dualpipe_idles_as_published(p, m, seconds):
    # github.com/deepseek-ai/DualPipe, README: (PP/2 − 1)(F&B + B − 3W) with the full backward B and F&B = F + B; PP + 1 held.
    f, b, w = seconds
    expected = (p / 2 - 1) * ((f + b + w) + (b + w) - 3 * w)
    assert figures.bubble_s(BOTH_WAYS, p, m, 2, *seconds) == pytest.approx(expected, abs=1e-9)
    assert in_flight(make_order(BOTH_WAYS, p, m, 2), Op.B).tolist() == [p + 1] * p
    # Half as many devices, each with both chunks that a device of DualPipe held a copy of.
    assert figures.bubble_s(IN_A_V, p // 2, m, 2, *seconds) == pytest.approx(expected / 2, abs=1e-9)


@pytest.mark.parametrize("p", [2, 4, 6, 8, 16])
def test_v_schedules_hold_what_their_blocks_live(p):
    # arXiv:2405.15362, section 3: lifespan over interval; of 2p chunks all, a half and a third, and a constant.
    shares = ((ZBV, 12), (V_HALF, 6), (V_MIN, 4))
    for order, slots in shares:
        held = in_flight(make_order(order, p, 4 * p, 2), Op.B)
        assert held.max() <= np.ceil(slots * p / 6) + 2
        assert held.max() >= slots * p / 6 - 1


@pytest.mark.parametrize("p", [2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("steps", [(4, 2, 4, 2), (1, 2, 1, 2), (1, 1, 1, 1)])
def test_building_blocks_never_collide(p, steps):
    block = building_block(p, steps)
    assert block.shape == (6, p)
    for device in range(p):
        assert sorted(block[:, device] % 6) == [0, 1, 2, 3, 4, 5]
        forward, forward_up, back, home, w_up, w_down = block[:, device]
        assert forward < forward_up < back < home
        assert w_up > back
        assert w_down > home


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_zbv_idles_nowhere(p):
    # README of sail-sg/zero-bubble: bubble rate 0 with F = B = W, at the activations of 1F1B.
    line = figures.timeline(ZBV, p, 3 * p, 2, 1.0, 1.0, 1.0)
    assert line.span_bubble_s.tolist() == pytest.approx([0.0] * p)
    chunk = np.full(2 * p, 0.5)
    two, three = (simulate(repeated(ZBV, p, 3 * p, 2, n), chunk, chunk, chunk).makespan_s for n in (2, 3))
    assert three - two == pytest.approx(3 * p * 3.0)


def test_out_of_order_takes_weight_gradients_off_the_ramps():
    # GPipe's bubble (p − 1)(F + B + W), less (p − 1)W.
    for p, m in ((4, 8), (8, 16)):
        assert figures.bubble_s(OUT_OF_ORDER, p, m, 1, 1.0, 1.5, 0.75) == pytest.approx((p - 1) * 2.5)


def test_breadth_first_divides_the_bubble_with_few_micro_batches():
    for v in (2, 4):
        assert figures.bubble_s(BREADTH_FIRST, 8, 8, v) == pytest.approx(7 * 3.0 / v)
        assert in_flight(make_order(BREADTH_FIRST, 8, 8, v)).tolist() == [8 * v] * 8


@pytest.mark.parametrize("p", [4, 7, 8, 16])
def test_bpipe_evens_out(p):
    # ⌈(p + 2)/2⌉ at most, and as many in all as 1F1B holds.
    held = BPIPE.in_flight(p, 100, np.arange(p))
    assert held.max() == -(-(p + 2) // 2)
    assert held.sum() == p * (p + 1) / 2


def test_zero_bubble_holds_as_published():
    # arXiv:2401.10241, Table 1, between F and B.
    for p, m in ((4, 12), (8, 32)):
        for order, formula in ((H1, pipeline.in_flight_zb_h1), (H2, pipeline.in_flight_zb_h2)):
            assert in_flight(make_order(order, p, m), Op.B).tolist() == formula(p, m, np.arange(p)).tolist()


def table(forward, backward, weight, hop=0.0):
    """Stages of one layer each, all alike, with nothing at the ends."""
    values = np.zeros((len(FIELDS), 4, 1))
    for name, seconds in (("forward_s", forward), ("backward_s", backward), ("weight_s", weight)):
        values[FIELDS.index(name), 0] = seconds
    values[FIELDS.index("forward_s"), 3] = hop
    return BlockTable(("dense", "embedding", "head", "boundary"), values)


@pytest.mark.parametrize("order", [PIPEDREAM, TWO_BUFFERED, H2])
def test_without_a_barrier_a_step_is_its_work(order):
    # Narayanan et al. 2021 (arXiv:2006.09503), section 3: no flush, no bubble. ZB-H2 with F = B = W: none either.
    blocks = table(1.0, 1.0, 1.0)
    (layout,) = (
        found
        for found in layouts(("dense",) * 8, blocks.kinds, 8, 1, order.placement, order.alike_in_order)
        if found.split == "even"
    )
    assert exact_step_s([blocks], layout, order, 32, [None])[0] == pytest.approx(32 * 3.0)


def test_a_slow_stage_sets_the_pace_without_a_flush():
    blocks = table(1.0, 1.0, 1.0)
    layout = next(found for found in layouts(("dense",) * 9, blocks.kinds, 4, 1) if found.split == "balanced")
    assert layout.counts[:, 0].tolist() == [2.0, 3.0, 2.0, 2.0]
    assert exact_step_s([blocks], layout, TWO_BUFFERED, 16, [None])[0] == pytest.approx(16 * 9.0)


def test_weight_gradients_wait_with_32sbh():
    # arXiv:2401.10241, Table 2: after its backward a GPT layer keeps 32sbh for its weight gradients.
    ledger, _ = figures.run("schedule", hold_weight_inputs, model="gpt3-175b", seq=2048, schedule="zb_h1")
    waiting = [
        item
        for item in ledger.of(figures.Resident, lifetime="weight_input")
        if item.block not in ("embedding", "head")
    ]
    assert figures.total_bytes(ledger, waiting) == pytest.approx(32 * 2048 * 12288)


@pytest.mark.parametrize("order", [ZBV, V_HALF, V_MIN])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_long_steps_are_short_ones_stretched(order, p):
    """Beyond six micro-batches per device, lists are stretched instead of played: to the same operations."""
    played = zbv_controllable._played(p, 9 * p, order.device_ops.__self__)
    for device in range(p):
        for stretched, own in zip(
            order.device_ops(Shape(p, 9 * p, 2, p), device), played.device_ops(device), strict=True
        ):
            assert np.array_equal(stretched, own)
