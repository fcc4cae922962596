"""Orders, engine and closed forms against published bubbles and peaks, and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from planner.costs import pipeline
from planner.costs.pipeline_bounds import bound_1f1b_s, bound_flush_s, bound_interleaved_s
from planner.errors import InvalidPlan
from planner.schedule.engine import simulate
from planner.schedule.memory import in_flight, peak_bytes
from planner.schedule.order import ORDERS, Op, make_order
from planner.schedule.program import compile_order
from planner.techniques.training.schedule.zero_bubble import H1, H2


def names(order, device):
    """A device's list as text: F0 is the forward of micro-batch 0, of chunk 1 where primed."""
    columns = zip(order.kind[device], order.stage[device], order.micro_batch[device], strict=True)
    return " ".join(f"{Op(k).name}{b}{chr(39) * (s // order.shape.p)}" for k, s, b in columns)


# Orders


def test_gpipe_runs_all_forwards_then_backwards_in_reverse():
    assert names(make_order("gpipe", 3, 3), 1) == "F0 F1 F2 B2 B1 B0"  # arXiv:1811.06965, Figure 2c


def test_1f1b_order():
    # arXiv:2104.04473, Figure 3, lower part: stage i starts with p − 1 − i forwards.
    order = make_order("1f1b", 4, 5)
    assert names(order, 0) == "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4"
    assert names(order, 3) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"


def test_interleaved_order():
    # arXiv:2104.04473, Figure 4: chunks take p micro-batches in turn; device 0 of 2 starts with 2·1 + 1·2
    # forwards.
    order = make_order("interleaved", 2, 4, 2)
    assert names(order, 0) == "F0 F1 F0' F1' F2 B0' F3 B1' F2' B0 F3' B1 B2' B3' B2 B3"
    assert names(order, 1) == "F0 F1 F0' B0' F1' B1' F2 B0 F3 B1 F2' B2' F3' B3' B2 B3"


def test_interleaved_ragged_group():
    # Megatron's table for 5 micro-batches in groups of 3: the last group has the 2 left over.
    order = make_order("interleaved", 2, 5, 2, group=3)
    forwards = [name for name in names(order, 0).split() if name[0] == "F"]
    assert " ".join(forwards) == "F0 F1 F2 F0' F1' F2' F3 F4 F3' F4'"


@pytest.mark.parametrize(
    ("p", "m", "group"),
    [
        (4, 8, 4),  # Megatron-LM's default, pp
        (
            4,
            5,
            5,
        ),  # its test gpt3_mcore_te_tp1_pp4_vp1_resume_torch_dist_tunable_overlap: 5 micro-batches in groups of 5
        (4, 7, 7),  # 4, 5 and 6 would leave a rest of 3, 2 and 1, which its schedule refuses
        (4, 11, 6),  # 4 leaves 3, 5 leaves 1, 6 leaves 5
    ],
)
def test_groups_are_as_short_as_megatron_accepts(p, m, group):
    order = make_order("interleaved", p, m, 2)
    assert order.shape.group == group
    assert simulate(order, [1.0] * 2 * p, [2.0] * 2 * p).makespan_s >= 2 * m * 3.0


def test_zb_h1_order():
    # arXiv:2401.10241, Figure 2: the last of three devices waits for 2 backwards before its first W.
    order = make_order(H1, 3, 4)
    assert names(order, 0) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert names(order, 2) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def test_orders_are_cached():
    assert make_order("1f1b", 4, 8) is make_order("1f1b", 4, 8)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("1f2b", 4, 8), "schedule"),
        (("1f1b", 0, 8), "pp"),
        (("1f1b", 4, 8, 2), "virtual_stages"),
        (("interleaved", 4, 8, 1), "virtual_stages"),
        (("interleaved", 4, 3, 2), "micro_batch_group"),
        (("interleaved", 4, 8, 2, 3), "micro_batch_group"),
        (("interleaved", 4, 9, 2, 4), "micro_batches"),
    ],
)
def test_orders_that_do_not_exist(arguments, where):
    with pytest.raises(InvalidPlan) as caught:
        make_order(*arguments)
    assert [problem.where for problem in caught.value.problems] == [where]


# Engine


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m", "step"), [(4, 8, 33.0), (8, 32, 117.0)])
def test_makespan_is_m_plus_p_minus_1(schedule, p, m, step):
    # (m + p − 1)(t_f + t_b) with t_b = 2·t_f: 11·3 and 39·3; the bubble is 3(p − 1) (arXiv:2104.04473,
    # section 2.2.1).
    line = simulate(make_order(schedule, p, m), np.ones(p), np.full(p, 2.0))
    assert line.makespan_s == step
    assert line.bubble_s.tolist() == [3.0 * (p - 1)] * p
    assert pipeline.bubble_s(p, 1.0, 2.0) == 3.0 * (p - 1)
    assert pipeline.bubble_fraction_of_total(p, m) == pytest.approx(3.0 * (p - 1) / step, rel=1e-12)


@pytest.mark.parametrize(
    ("p", "m", "v", "bubble", "peak"),
    [(4, 8, 2, 4.5, 11), (4, 8, 4, 2.25, 19), (8, 32, 2, 10.5, 23), (8, 32, 4, 5.25, 39)],
)
def test_interleaved_bubble_is_divided_by_v(p, m, v, bubble, peak):
    # (p − 1)(t_f + t_b)/v (arXiv:2104.04473, section 2.2.2); p·v + p − 1 chunks alive on device 0.
    order = make_order("interleaved", p, m, v)
    line = simulate(order, np.full(p * v, 1.0 / v), np.full(p * v, 2.0 / v))
    assert line.bubble_s.tolist() == [bubble] * p
    assert line.makespan_s == 3.0 * m + bubble
    assert pipeline.bubble_s(p, 1.0, 2.0, v) == bubble
    assert in_flight(order)[0] == peak


@pytest.mark.parametrize(("p", "m"), [(4, 12), (8, 32)])
@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (1.0, 1.2, 0.8)])
def test_zero_bubble_spans(p, m, seconds):
    # arXiv:2401.10241, Table 1: H1 (p − 1)(F + B − W), H2 (p − 1)(F + B − 2W), within a device's own span.
    f, b, w = seconds
    for schedule, span in ((H1, (p - 1) * (f + b - w)), (H2, (p - 1) * (f + b - 2 * w))):
        order = make_order(schedule, p, m)
        line = simulate(order, np.full(p, f), np.full(p, b), np.full(p, w))
        assert line.span_bubble_s.max() == pytest.approx(span, abs=1e-9)
    assert line.makespan_s - line.busy_s[0] >= (p - 1) * f - 1e-9  # the skew between devices stays
    assert pipeline.span_bubble_zb_h1_s(p, f, b, w) == pytest.approx((p - 1) * (f + b - w))
    assert pipeline.span_bubble_zb_h2_s(p, f, b, w) == pytest.approx((p - 1) * (f + b - 2 * w))


def test_hops_delay_both_ways_and_cost_nothing_within_a_device():
    # One micro-batch: down and up, 1 + 2 on each of two stages and the hop twice.
    assert simulate(make_order("1f1b", 2, 1), [1.0, 1.0], [2.0, 2.0], hop_s=0.25).makespan_s == 6.5
    assert simulate(make_order("1f1b", 1, 3), [1.0], [2.0], hop_s=0.25).makespan_s == 9.0


def test_hops_per_edge():
    # One micro-batch through three stages: edges of 0.5 and 0.25, each there and back.
    order = make_order("1f1b", 3, 1)
    assert simulate(order, np.ones(3), np.ones(3), hop_s=[0.5, 0.25]).makespan_s == 6.0 + 2 * 0.75


def test_equal_stages_with_hops_in_closed_form():
    # p = 2, m = 3: N = 4 forwards and backwards on the path, 2·0.5·⌊4·1/2⌋ in hops.
    line = simulate(make_order("1f1b", 2, 3), [1.0, 1.0], [2.0, 2.0], hop_s=0.5)
    assert line.makespan_s == 4 * 3.0 + 2.0
    assert pipeline.latency_1f1b_s(2, 3, 3.0, 0.5) == 14.0


def test_heads_and_tails_extend_the_step():
    order = make_order("1f1b", 2, 2)
    line = simulate(order, [1.0, 1.0], [2.0, 2.0], head_s=[4.0, 0.0], tail_s=[0.0, 9.0])
    # Device 0 starts at 4; device 1 runs 5..11 (F0 5–6, B0 6–8, F1 8–9, B1 9–11) and its tail ends at 20.
    assert line.first_start_s.tolist() == [4.0, 5.0]
    assert line.last_end_s.tolist() == [13.0, 11.0]
    assert line.makespan_s == 20.0
    assert line.bubble_s.tolist() == [20.0 - 6.0 - 4.0, 20.0 - 6.0 - 9.0]


def test_weight_gradient_is_part_of_an_unsplit_backward():
    order = make_order("1f1b", 2, 4)
    whole = simulate(order, [1.0, 1.0], [2.0, 2.0])
    assert simulate(order, [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]).makespan_s == whole.makespan_s


def test_split_backward_needs_weight_seconds():
    with pytest.raises(ValueError, match="weight_s"):
        simulate(make_order(H1, 2, 4), [1.0, 1.0], [1.0, 1.0])


def test_steady_part_is_folded():
    # 1536 micro-batches on 8 stages: all but the warm-up and the cool-down repeat two rounds (one F, one B).
    program = compile_order(make_order("1f1b", 8, 1536))
    assert sum(len(segment.rounds) for segment in program.segments) < 100
    assert max(segment.repeats for segment in program.segments) > 1500
    assert simulate(make_order("1f1b", 8, 1536), np.ones(8), np.full(8, 2.0)).makespan_s == 3.0 * (1536 + 7)


# Memory


def test_peaks_per_stage():
    # arXiv:2104.04473, section 2.2.1: m in GPipe; p − i in 1F1B. arXiv:2401.10241, Table 1: p and 2p − 1
    # between F and B.
    assert in_flight(make_order("gpipe", 4, 8)).tolist() == [8, 8, 8, 8]
    assert in_flight(make_order("1f1b", 4, 8)).tolist() == [4, 3, 2, 1]
    assert in_flight(make_order(H1, 4, 8), Op.B).tolist() == [4, 3, 2, 1]
    assert in_flight(make_order(H2, 4, 12), Op.B).tolist() == [7, 5, 3, 1]


@pytest.mark.parametrize("device", range(4))
def test_zb_h1_memory_of_a_device(device):
    # Table 1 of arXiv:2401.10241: worker i (from 1) holds (p − i + 1)·M_B + (i − 1)·M_W.
    peak = peak_bytes(make_order(H1, 4, 16), np.full(4, 100.0), weight_input_bytes=np.full(4, 10.0))
    assert peak[device] == (4 - device) * 100.0 + device * 10.0


def test_peak_bytes_of_unequal_chunks_and_transients():
    # Device 0 runs F0 F1 F0' F1' F2 B0' F3 B1' F2' B0 …: the most it holds is at F2', when micro-batches 0 to
    # 3 are alive in chunk 0 (10 B each) and 2 in chunk 1 (1 B).
    order = make_order("interleaved", 2, 4, 2)
    assert peak_bytes(order, [10.0, 0.0, 1.0, 0.0])[0] == 41.0
    # A transient of chunk 1's forward adds to that moment.
    assert peak_bytes(order, [10.0, 0.0, 1.0, 0.0], forward_transient_bytes=[0.0, 0.0, 5.0, 0.0])[0] == 46.0


# Bounds


def test_flush_bound_by_hand():
    # Slow last of three stages, m = 4: 4·6 + (3 + 3) + 2·2·0.5; three equal ones would give 4·3 + 6 + 2.
    assert bound_flush_s([1.0, 1.0, 2.0], [2.0, 2.0, 4.0], 4, 0.5) == 32.0
    assert bound_flush_s([1.0], [2.0], 4, 0.5, [3]) == 20.0


def test_1f1b_bound_counts_the_hops_of_each_lap():
    # Two stages, m = 3: N = 4 stage times and 2·⌊4/2⌋ hops, as in the closed form; a flush bound sees 2 hops
    # only.
    assert bound_1f1b_s([1.0, 1.0], [2.0, 2.0], 3, 0.5) == 14.0
    assert bound_flush_s([1.0, 1.0], [2.0, 2.0], 3, 0.5) == 13.0


def test_interleaved_bound_is_exact_for_equal_stages():
    # 3·m + 4.5 for p = 4, m = 8, v = 2 (see the bubbles above), chunks of half a stage.
    assert bound_interleaved_s([[0.5], [0.5]], [[1.0], [1.0]], 8, 0.0, [4]) == 28.5


def test_alpa_latency_is_no_bound():
    # Too low with hops: 11·3 for four equal stages, where the step takes 41 (8 hops of 0.5 each way).
    equal = simulate(make_order("1f1b", 4, 8), np.ones(4), np.full(4, 2.0), hop_s=0.5)
    assert pipeline.latency_alpa_s(np.full(4, 3.0), 8) == 33.0
    assert equal.makespan_s == 41.0
    # Too high where a slow first stage hides the others: it works 8·4.1, and waits once, 0.1 before its last
    # backward.
    slow_first = simulate(make_order("1f1b", 2, 8), [4.0, 0.1], [0.1, 0.1])
    assert pipeline.latency_alpa_s(np.array([4.1, 0.2]), 8) == pytest.approx(33.0, rel=1e-12)
    assert slow_first.makespan_s == pytest.approx(32.9, rel=1e-12)


def test_every_schedule_is_registered_with_a_period():
    assert sorted(ORDERS) == ["1f1b", "gpipe", "interleaved"]
    for name in ORDERS:
        order = make_order(name, 4, 64, 2 if name == "interleaved" else 1)
        assert max(segment.repeats for segment in compile_order(order).segments) >= 3
