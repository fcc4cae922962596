"""Laws of the schedule engine: a naive recursion agrees, folding changes nothing, bounds stay below."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.costs import pipeline
from planner.costs.pipeline_bounds import bound_1f1b_s, bound_flush_s, bound_interleaved_s
from planner.schedule.engine import simulate
from planner.schedule.memory import in_flight, peak_bytes
from planner.schedule.order import Op, make_order
from planner.schedule.program import compile_order
from planner.techniques.training.schedule.zero_bubble import H1, H2

ONE_CHUNK = ("gpipe", "1f1b", H1, H2)
SETTINGS = settings(max_examples=60)


@st.composite
def orders(draw, schedules=(*ONE_CHUNK, "interleaved"), most=12):
    """An order of a small pipeline, ragged groups of micro-batches included."""
    schedule, p = draw(st.sampled_from(schedules)), draw(st.integers(1, 6))
    if schedule != "interleaved":
        return make_order(schedule, p, draw(st.integers(1, most)))
    group = draw(st.integers(p, p + 3))
    m = group * draw(st.integers(1, 3)) + draw(st.sampled_from([0, *range(p, group)]))
    return make_order(schedule, p, m, draw(st.integers(2, 4)), group)


def seconds(draw, *shape):
    """Durations: whole (many ties), near-equal, or wild, and sometimes zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["whole", "near", "wild"]))
    if kind == "whole":
        return rng.integers(0, 4, shape).astype(float)
    return rng.uniform(0.9, 1.1, shape) if kind == "near" else rng.exponential(1.0, shape)


def naive_ends(order, forward, backward, weight, hop, head):
    """End of every operation by its definition, all dependencies explicit; and every device's last."""
    n_virtual, p = order.n_virtual, order.shape.p
    lists = [
        [(Op(k), int(s), int(b)) for k, s, b in zip(*rows, strict=True)]
        for rows in zip(order.kind, order.stage, order.micro_batch, strict=True)
    ]
    duration = {Op.F: forward, Op.B: backward, Op.W: weight}
    end, todo = {}, [0] * p
    clock = list(head)
    while any(todo[r] < len(lists[r]) for r in range(p)):
        before = len(end)
        for r in range(p):
            while todo[r] < len(lists[r]):
                kind, s, b = lists[r][todo[r]]
                needs = []
                if kind == Op.F and s > 0:
                    needs.append(((Op.F, s - 1, b), 0.0 if (s - 1) % p == r else hop[s - 1]))
                if kind == Op.B:
                    needs.append(((Op.F, s, b), 0.0))
                    if s < n_virtual - 1:
                        needs.append(((Op.B, s + 1, b), 0.0 if (s + 1) % p == r else hop[s]))
                if kind == Op.W:
                    needs.append(((Op.B, s, b), 0.0))
                if any(need not in end for need, _ in needs):
                    break
                start = max([clock[r], *(end[need] + delay for need, delay in needs)])
                clock[r] = end[kind, s, b] = start + duration[kind][s]
                todo[r] += 1
        assert len(end) > before, "the order deadlocks"
    return end, clock


@SETTINGS
@given(st.data(), orders())
def test_engine_is_the_longest_path(data, order):
    n_virtual, p = order.n_virtual, order.shape.p
    forward, backward, weight = (seconds(data.draw, n_virtual) for _ in range(3))
    hop, head, tail = (seconds(data.draw, n) for n in (n_virtual - 1, p, p))
    line = simulate(order, forward, backward, weight, hop_s=hop, head_s=head, tail_s=tail)
    full = backward if order.splits_backward else backward + weight
    end, clock = naive_ends(order, forward, full, weight, hop, head)
    assert line.last_end_s == pytest.approx(clock, rel=1e-12)
    assert line.makespan_s == pytest.approx(max(np.add(clock, tail)), rel=1e-12)
    starts = [end[Op.F, r, 0] - forward[r] for r in range(p)]  # every order begins with this forward
    assert line.first_start_s == pytest.approx(starts, rel=1e-9, abs=1e-12)
    busy = [(forward + backward + weight)[r::p].sum() * order.shape.m for r in range(p)]
    assert line.busy_s == pytest.approx(busy, rel=1e-12)
    assert (line.bubble_s >= -1e-9 * line.makespan_s).all()


@SETTINGS
@given(st.data(), st.sampled_from([*ONE_CHUNK, "interleaved"]), st.integers(2, 6), st.integers(1, 3))
def test_folding_changes_nothing(data, schedule, p, batch):
    v = data.draw(st.integers(2, 3)) if schedule == "interleaved" else 1
    m = p * data.draw(st.integers(4, 12)) if v > 1 else data.draw(st.integers(1, 150))
    order = make_order(schedule, p, m, v)
    unfolded = replace(order, period_ops=0)
    assert all(segment.repeats == 1 for segment in compile_order(unfolded).segments)
    given_s = [seconds(data.draw, p * v, batch) for _ in range(3)]
    hop = seconds(data.draw, p * v - 1, batch)
    folded, whole = (simulate(o, *given_s, hop_s=hop) for o in (order, unfolded))
    for name in ("makespan_s", "busy_s", "last_end_s", "first_start_s"):
        assert getattr(folded, name) == pytest.approx(getattr(whole, name), rel=1e-11, abs=1e-12)


@SETTINGS
@given(st.data(), orders(most=60), st.integers(1, 4))
def test_a_batch_is_its_rows(data, order, batch):
    durations = [seconds(data.draw, order.n_virtual, batch) for _ in range(3)]
    hop = seconds(data.draw, batch)
    together = simulate(order, *durations, hop_s=hop).makespan_s
    for k in range(batch):
        alone = simulate(order, *(x[:, k] for x in durations), hop_s=hop[k]).makespan_s
        assert float(together[k]) == pytest.approx(float(alone), rel=1e-11)


@SETTINGS
@given(orders(most=30))
def test_in_flight_closed_forms(order):
    p, m, v, group = order.shape.p, order.shape.m, order.shape.v, order.shape.group
    device = np.arange(p)
    expected = {
        "gpipe": np.full(p, pipeline.in_flight_gpipe(m)),
        "1f1b": pipeline.in_flight_1f1b(p, m, device),
        "interleaved": pipeline.in_flight_interleaved(p, m, v, device, group),
        "zb_h1": pipeline.in_flight_zb_h1(p, m, device),
        "zb_h2": pipeline.in_flight_zb_h2(p, m, device),
    }
    assert in_flight(order, Op.B).tolist() == expected[order.schedule].tolist()


@SETTINGS
@given(st.data(), orders(most=40))
def test_peak_bytes_is_a_sweep_over_the_list(data, order):
    kept, ahead, back = (seconds(data.draw, order.n_virtual, 2) for _ in range(3))
    on_to_w = kept * 0.25
    extra = {Op.F: ahead, Op.B: back, Op.W: 0.0 * back}
    peaks = []
    for kinds, stages in zip(order.kind, order.stage, strict=True):
        live, peak = np.zeros(2), np.zeros(2)
        for kind, s in zip(kinds, stages, strict=True):
            live = live + (kept[s] if kind == Op.F else 0.0)
            peak = np.maximum(peak, live + extra[Op(kind)][s])
            if kind == Op.B:
                live = live - (kept[s] - on_to_w[s] if order.splits_backward else kept[s])
            elif kind == Op.W:
                live = live - on_to_w[s]
        peaks.append(peak)
    found = peak_bytes(
        order, kept, weight_input_bytes=on_to_w, forward_transient_bytes=ahead, backward_transient_bytes=back
    )
    assert found == pytest.approx(np.array(peaks), rel=1e-9, abs=1e-9)


@st.composite
def runs(draw, chunks=()):
    """Stage classes with their number of stages, and the same stage by stage."""
    lengths = np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    assume(lengths.sum() > 0)
    classes = [seconds(draw, *chunks, len(lengths), 3) for _ in range(2)]
    stages = [np.repeat(x, lengths, axis=len(chunks)) for x in classes]
    return lengths, classes, stages, seconds(draw, 3)


@SETTINGS
@given(runs(), st.integers(1, 40))
def test_1f1b_bound_is_a_bound(given_runs, m):
    lengths, classes, stages, hop = given_runs
    step = simulate(make_order("1f1b", int(lengths.sum()), m), *stages, hop_s=hop).makespan_s
    flush, cycles = (bound(*classes, m, hop, lengths) for bound in (bound_flush_s, bound_1f1b_s))
    assert (flush <= cycles).all()
    assert (cycles <= step * (1 + 1e-12)).all()
    assert (bound_1f1b_s(*stages, m, hop) <= step * (1 + 1e-12)).all()


@SETTINGS
@given(runs(), st.integers(1, 12), st.sampled_from(["gpipe", "1f1b"]))
def test_flush_bound_holds_for_any_order(given_runs, m, schedule):
    lengths, classes, stages, hop = given_runs
    step = simulate(make_order(schedule, int(lengths.sum()), m), *stages, hop_s=hop).makespan_s
    assert (bound_flush_s(*classes, m, hop, lengths) <= step * (1 + 1e-12)).all()


@SETTINGS
@given(st.data(), st.integers(2, 4), st.integers(0, 3))
def test_interleaved_bound_is_a_bound(data, v, wider):
    lengths, classes, stages, hop = data.draw(runs(chunks=(v,)))
    p = int(lengths.sum())
    group = p + wider
    m = group * data.draw(st.integers(1, 4)) + data.draw(st.sampled_from([0, *range(p, group)]))
    flat = [x.reshape(p * v, 3) for x in stages]
    step = simulate(make_order("interleaved", p, m, v, group), *flat, hop_s=hop).makespan_s
    assert (bound_interleaved_s(*classes, m, hop, lengths, group) <= step * (1 + 1e-12)).all()


@SETTINGS
@given(st.integers(1, 8), st.integers(1, 60), st.floats(0.0, 3.0), st.floats(0.1, 3.0), st.floats(0.0, 9.0))
def test_equal_stages_have_a_closed_form(p, m, forward, backward, hop):
    order = make_order("1f1b", p, m)
    step = simulate(order, np.full(p, forward), np.full(p, backward), hop_s=hop).makespan_s
    assert step == pytest.approx(pipeline.latency_1f1b_s(p, m, forward + backward, hop), rel=1e-12)
    assert step == pytest.approx(bound_1f1b_s([forward], [backward], m, hop, [p]), rel=1e-12)


@SETTINGS
@given(st.integers(1, 8), st.integers(1, 6), st.integers(2, 4), st.floats(0.0, 3.0), st.floats(0.1, 3.0))
def test_equal_chunks_reach_the_interleaved_bound(p, groups, v, forward, backward):
    m = p * groups
    step = simulate(
        make_order("interleaved", p, m, v), np.full(p * v, forward), np.full(p * v, backward)
    ).makespan_s
    assert step == pytest.approx(m * v * (forward + backward) + (p - 1) * (forward + backward), rel=1e-12)
    assert step == pytest.approx(
        bound_interleaved_s([[forward]] * v, [[backward]] * v, m, 0.0, [p]), rel=1e-12
    )
