"""Laws that every schedule of the catalogue keeps, whatever its order: dependencies, makespan, bounds and memory."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.engine.block_table import FIELDS, BlockTable
from planner.errors import InvalidPlan
from planner.operators.baseline import EMBEDDING, HEAD
from planner.pipeline.composer import memory, saturated, step_bound
from planner.pipeline.layout import BOUNDARY, layouts
from planner.pipeline.step_time import exact_step_s
from planner.schedule.engine import simulate
from planner.schedule.live import live_vectors
from planner.schedule.memory import peak_bytes
from planner.schedule.order import Op, generator_of, make_order, repeated
from planner.schedule.program import compile_order
from planner.schedule.times import operation_times
from planner.specs.stack import load_stack
from planner.technique import discover

GENERATORS = {
    generator_of(t.order).name: generator_of(t.order) for t in discover().values() if t.slot == "schedule"
}
SETTINGS = settings(max_examples=40)


def shapes(generator, most_chunks=4):
    """Every small shape that a schedule accepts."""
    for p in (1, 2, 3, 4, 6):
        for m in (1, 2, 3, 4, 6, 8, 12, 16):
            for v in generator.chunks(most_chunks):
                with suppress(InvalidPlan):
                    yield make_order(generator, p, m, v)


@st.composite
def orders(draw):
    """Any schedule in any small shape."""
    generator = GENERATORS[draw(st.sampled_from(sorted(GENERATORS)))]
    return generator, draw(st.sampled_from(list(shapes(generator))))


def lists(order):
    return [
        [(Op(k), int(s), int(b)) for k, s, b in zip(*rows, strict=True)]
        for rows in zip(order.kind, order.stage, order.micro_batch, strict=True)
    ]


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_micro_batch_passes_every_stage_of_one_pipeline(name):
    generator = GENERATORS[name]
    found = 0
    for order in shapes(generator):
        found += 1
        p, m, v = order.shape.p, order.shape.m, order.shape.v
        copies = generator.placement.copies
        ops = (Op.F, Op.B, Op.W) if generator.splits_backward else (Op.F, Op.B)
        passed = defaultdict(list)
        for device, own in enumerate(lists(order)):
            at = {operation: index for index, operation in enumerate(own)}
            assert len(at) == len(own), "nothing runs twice"
            for op, stage, k in own:
                assert order.device_of_stage[stage] == device
                passed[op, k].append(stage)
                if op == Op.F:
                    assert at[Op.F, stage, k] < at[Op.B, stage, k]
                if op == Op.B and generator.splits_backward:
                    assert at[Op.B, stage, k] < at[Op.W, stage, k]
        assert set(passed) == {(op, k) for op in ops for k in range(m)}
        for stages in passed.values():
            pipeline = sorted(stages)
            first = pipeline[0]
            assert pipeline == list(range(first, first + p * v // copies))
            assert first % (p * v // copies) == 0
    assert found


def naive_makespan(order, forward, backward, weight, hop):
    """The longest path by its definition, every dependency explicit."""
    todo, end = lists(order), {}
    sizes = order.n_virtual, order.shape.m
    each = (np.broadcast_to(x if np.ndim(x) == 2 else x[:, None], sizes) for x in (forward, backward, weight))
    p, duration = order.shape.p, dict(zip((Op.F, Op.B, Op.W), each, strict=True))
    left = order.leaves_after if order.leaves_after is not None else np.zeros_like(order.kind)
    position = {x: (d, i) for d, own in enumerate(todo) for i, x in enumerate(own)}
    downstream = {int(u): s for s, u in enumerate(order.upstream) if u >= 0}
    clock, at = [0.0] * p, [0] * p

    def arrives(sender, edge, receiver):
        d, i = position[sender]
        if d == receiver:
            return end.get(sender)
        leaves = end.get(todo[d][i + int(left[d, i])])
        return None if leaves is None else leaves + hop[edge]

    while any(at[d] < len(todo[d]) for d in range(p)):
        moved = False
        for d in range(p):
            while at[d] < len(todo[d]):
                op, s, k = todo[d][at[d]]
                needs = []
                if op == Op.F and order.upstream[s] >= 0:
                    needs.append(arrives((Op.F, int(order.upstream[s]), k), int(order.upstream[s]), d))
                if op == Op.B:
                    needs.append(end.get((Op.F, s, k)))
                    if s in downstream:
                        needs.append(arrives((Op.B, downstream[s], k), s, d))
                if op == Op.W:
                    needs.append(end.get((Op.B, s, k)))
                if any(need is None for need in needs):
                    break
                clock[d] = end[op, s, k] = max([clock[d], *needs]) + duration[op][s, k]
                at[d] += 1
                moved = True
        assert moved, "the order deadlocks"
    return max(clock)


@SETTINGS
@given(orders(), st.integers(0, 2**32 - 1), st.booleans())
def test_engine_is_the_longest_path(drawn, seed, whole):
    _, order = drawn
    rng = np.random.default_rng(seed)
    n = order.n_virtual

    def seconds(size):
        return rng.integers(0, 4, size).astype(float) if whole else rng.exponential(1.0, size)

    forward, backward, weight, hop = (seconds(size) for size in (n, n, n, n - 1))
    full = backward if order.splits_backward else backward + weight
    expected = naive_makespan(order, forward, full, weight, hop)
    folded = simulate(order, forward, backward, weight, hop_s=hop).makespan_s
    unfolded = simulate(replace(order, period_ops=0), forward, backward, weight, hop_s=hop).makespan_s
    assert float(folded) == pytest.approx(expected, rel=1e-11, abs=1e-12)
    assert float(unfolded) == pytest.approx(expected, rel=1e-11, abs=1e-12)


@SETTINGS
@given(orders(), st.integers(0, 2**32 - 1), st.floats(0.0, 2.0))
def test_stages_and_micro_batches_that_all_differ_take_the_longest_path(drawn, seed, hop_s):
    """Sequences of unlike lengths (DynaPipe, arXiv:2311.10418) on stages of unlike sizes, under every schedule."""
    _, order = drawn
    rng = np.random.default_rng(seed)
    seconds = rng.exponential(1.0, (3, order.n_virtual, order.shape.m))
    if not order.splits_backward:
        seconds[2] = 0.0
    expected = naive_makespan(order, *seconds, np.full(order.n_virtual, hop_s))
    assert operation_times(order, seconds, hop_s)[1].max() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_live_blocks_are_those_of_the_memory_timeline(name):
    rng = np.random.default_rng(7)
    generator = GENERATORS[name]
    for order in shapes(generator):
        p, m, v = order.shape.p, order.shape.m, order.shape.v
        saved, waiting = rng.uniform(1.0, 5.0, (2, p * v))
        expected = peak_bytes(order, saved, weight_input_bytes=waiting)
        for device in range(p):
            own = np.flatnonzero(order.device_of_stage == device)  # chunk by chunk
            live = live_vectors(generator, p, m, v, device, np.eye(v))
            held = np.concatenate([saved[own], waiting[own]]) if generator.splits_backward else saved[own]
            assert (live @ held).max() == pytest.approx(expected[device])


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_more_micro_batches_than_saturation_hold_no_more(name):
    generator, p = GENERATORS[name], 4
    for v in generator.chunks(4):
        enough = int(saturated(generator, p, v, 160))
        if enough == 160:
            continue
        for device in range(p):
            at = live_vectors(generator, p, enough, v, device, np.eye(v))
            assert np.array_equal(at, live_vectors(generator, p, 160, v, device, np.eye(v)))


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_steady_lists_fold(name):
    """A long step compiles to a few rounds, where the schedule has a period."""
    generator = GENERATORS[name]
    v = generator.chunks(4)[0]
    if generator.period_ops(make_order(generator, 4, 16, v).shape):
        program = compile_order(make_order(generator, 4, 256, v))
        assert max(segment.repeats for segment in program.segments) >= 3


KINDS = ("dense", EMBEDDING, HEAD, BOUNDARY)


def table(rng, hop):
    """A block table with random seconds and bytes of a dense layer, embedding and head, and the update's tail."""
    values = np.zeros((len(FIELDS), len(KINDS), 1))
    for name in (
        "forward_s",
        "backward_s",
        "weight_s",
        "saved_bytes",
        "weight_input_bytes",
        "main_step_s",
        "always_bytes",
    ):
        values[FIELDS.index(name), :3, 0] = rng.uniform(0.5, 2.0, 3) * (0.1 if name == "main_step_s" else 1.0)
    values[FIELDS.index("forward_s"), 3] = hop
    values[FIELDS.index("recompute_s"), 0] = rng.uniform(0.0, 1.0)
    return BlockTable(KINDS, values)


@SETTINGS
@given(orders(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3]))
def test_bound_is_never_above_the_engine(drawn, seed, hop):
    generator, order = drawn
    p, m, v = order.shape.p, order.shape.m, order.shape.v
    if p == 1:
        return
    blocks = table(np.random.default_rng(seed), hop)
    for layout in layouts(("dense",) * 24, KINDS, p, v, generator.placement, generator.alike_in_order):
        bound_s = step_bound(blocks, layout, np.array([float(m)]), None, generator)
        step_s = exact_step_s([blocks], layout, generator, m, [None])
        assert float(bound_s[0]) <= float(step_s[0]) * (1 + 1e-9)


@SETTINGS
@given(orders(), st.integers(0, 2**32 - 1))
def test_peak_memory_is_the_timelines(drawn, seed):
    generator, order = drawn
    p, m, v = order.shape.p, order.shape.m, order.shape.v
    blocks = table(np.random.default_rng(seed), 0.0)
    if p == 1 or generator.name == "bpipe":  # parks activations elsewhere: no list says so
        return
    layout = layouts(("dense",) * 24, KINDS, p, v, generator.placement, generator.alike_in_order)[0]
    stack = load_stack()
    peak, *_ = memory(blocks, layout, generator, np.array([float(m)]), stack, 0.0)
    lives = peak_bytes(
        order,
        layout.counts @ blocks["saved_bytes"],
        weight_input_bytes=layout.counts @ blocks["weight_input_bytes"],
    )
    held = layout.device_counts @ blocks["always_bytes"]
    expected = (held + (1.0 + stack.fragmentation.value) * lives).max() + stack.framework_bytes.value
    assert float(peak[0]) == pytest.approx(expected)


@SETTINGS
@given(orders(), st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_steps_without_a_barrier_fold_too(drawn, seed, steps):
    generator, order = drawn
    if not generator.flushes:
        return
    p, m, v = order.shape.p, order.shape.m, order.shape.v
    several = repeated(generator, p, m, v, steps)
    seconds = np.random.default_rng(seed).exponential(1.0, (3, order.n_virtual))
    folded = simulate(several, *seconds).makespan_s
    assert float(folded) == pytest.approx(
        float(simulate(replace(several, period_ops=0), *seconds).makespan_s), rel=1e-11
    )
