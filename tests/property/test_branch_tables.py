"""Where the search adds up what a state and what recompute and swaps change, the sum is the branch's own ledger."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from planner.engine.block_table import COMPACT, HELD, ONCE, PACED, TIMES, BlockTable
from planner.pipeline.composer import step_bound
from planner.pipeline.step_time import exact_step_s
from planner.solve.space import Rows, order_of
from planner.solve.tables import ASPECTS, BranchTables
from planner.solve.uniform import UniformSearch
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload

JOBS = [
    ("llama3.1-8b", "h100-sxm:4x8"),
    ("deepseek-v2-lite", "h100-sxm:2x8"),
    ("llama3.1-8b", "rtx-4090:4x8"),
]


def tables_of(model: str, cluster: str) -> tuple[UniformSearch, Rows, BranchTables]:
    """A search, a spread of meshes, and the tables of its first prefix on them."""
    problem = Problem(
        load_model(model), load_cluster(cluster), TrainWorkload(64, 4096), load_stack(),
        fixed={"sequence_parallel": "true", "tensor_overlap": "none", "context": "p2p"},
    )  # fmt: skip
    search = UniformSearch(problem, 1, lambda batch: [])
    prefix = next(search.space.prefixes())
    knobs = search.space.knobs(prefix)
    ctx = search.space.rows.context(problem, knobs)
    valid = np.flatnonzero(search.faults(prefix, ctx).first < 0)
    rows = search.space.rows.take(valid[:: max(1, len(valid) // 24)])
    ctx = rows.context(problem, knobs)
    ledger = search.ledger(prefix, ctx)
    tables = BranchTables(search.space, search.branches, search.pricer, search.kinds, prefix, ctx, ledger)
    return search, rows, tables


def every_branch(search: UniformSearch) -> Iterator[tuple[int, int, int]]:
    """States, recompute choices and swaps by number."""
    branches = search.branches
    return product(range(len(branches.states)), range(len(branches.recomputes)), range(len(branches.swaps)))


@pytest.mark.parametrize(("model", "cluster"), JOBS[:2])
def test_sums_of_changes_are_the_branch(model: str, cluster: str) -> None:
    """Every state with every recompute choice and swap, on a spread of meshes; aspects apart say the same."""
    search, rows, tables = tables_of(model, cluster)
    branches = search.branches
    active = branches.activity(rows, tables.ctx.knobs)
    added, every = 0, np.arange(len(rows))
    for state, recompute, swap in every_branch(search):
        on = active.states[state]
        if not on.any():
            continue
        total = tables.of_branch(state, recompute, swap, every)
        whole = tables.whole(state, recompute, swap)
        added += len(tables._parts(state, recompute, swap, beside=True)) > 1
        scale = np.abs(whole).max(axis=(0, 2), keepdims=True) + np.abs(total).max(axis=(0, 2), keepdims=True)
        names = {slot: choice.value for slot, choice in branches.recipe(state, recompute, swap).items()}
        assert np.all(np.abs(total - whole)[on] <= 1e-12 * scale), names
        for fields in (TIMES, ONCE, HELD):
            alone = tables.of_branch(state, recompute, swap, every, fields=fields)
            assert np.array_equal(alone, total[:, [COMPACT.index(name) for name in fields]]), names
    assert added > 40


def test_tables_seen_on_some_rows_are_those_rows() -> None:
    """Views, and views of views, say of their rows what tables of these rows alone say."""
    search, rows, tables = tables_of(*JOBS[0])
    some = np.arange(len(rows))[::3]
    seen, alone = tables.of(np.arange(len(rows))[::-1]).of(len(rows) - 1 - some), tables.take(some)
    assert len(seen) == len(alone) == len(some)
    for branch in [*every_branch(search)][::7]:
        every = np.arange(len(some))
        expected = alone.of_branch(*branch, every)
        np.testing.assert_allclose(seen.of_branch(*branch, every), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(seen.times(1), alone.times(1), rtol=1e-12, atol=1e-12)


def floor_of_branch(
    tables: BranchTables, state: int, recompute: int, swap: int, at: np.ndarray
) -> tuple[np.ndarray, bool]:
    """The floor of a branch's times on some rows, (rows, time fields, kinds), and whether it is the branch's own."""
    found, own = [], True
    for aspect in ASPECTS[TIMES]:
        groups = tables.summands(state, recompute, swap, aspect, floor=True)
        own &= all(len(group) == 1 for group in groups)
        each = [tables.summand(group, aspect, at, first=group is groups[0]) for group in groups]
        found.append(sum(each))
    return np.concatenate(found, axis=1), own


@pytest.mark.parametrize(("model", "cluster"), JOBS[:2])
def test_floors_of_many_branches_are_below_their_tables(model: str, cluster: str) -> None:
    """Forwards, and backwards with all that runs again, of every branch at once are no longer than those of its own ledger, and
    most of them as long; what it does once and holds is its own."""
    search, rows, tables = tables_of(model, cluster)
    active = search.branches.activity(rows, tables.ctx.knobs)
    whole_of = {
        branch: tables.whole(*branch).transpose(1, 0, 2)
        for branch in every_branch(search)
        if (active.states[branch[0]] & active.recomputes[branch[1]]).any()
    }
    single, some = [(name,) for name in COMPACT[len(PACED) :]], np.arange(0, len(rows), 2)
    least, beside = tables.floors(list(whole_of), some, single)
    as_long = 0
    for number, (branch, whole) in enumerate(whole_of.items()):
        on = (active.states[branch[0]] & active.recomputes[branch[1]])[some]
        forward, *later = whole[: len(PACED), some]
        times, scale = np.stack([forward, sum(later)]), np.abs(whole).max(axis=(1, 2))
        excess = (least[:, number] - times)[:, on]
        assert np.all(excess <= 1e-12 * scale[: len(PACED)].sum()), branch
        as_long += np.mean(np.abs(excess) <= 1e-9 * scale[: len(PACED)].sum()) > 0.9 if on.any() else 0
        apart = np.abs(beside[:, number] - whole[len(PACED) :, some])[:, on]
        assert np.all(apart <= 1e-12 * scale[len(PACED) :, None, None]), branch
    assert as_long > len(whole_of) / 4


@pytest.mark.parametrize(("model", "cluster"), JOBS)
def test_floors_are_below_the_engine(model: str, cluster: str) -> None:
    """What the parts of a branch say of its times is never above the schedule engine's price of the branch's own ledger, whatever
    share of the layers is recomputed, and is the branch's own where it says so."""
    search, rows, tables = tables_of(model, cluster)
    active = search.branches.activity(rows, tables.ctx.knobs)
    draw = np.random.default_rng(1)
    below = 0
    for state, recompute, swap in every_branch(search):
        on = np.flatnonzero(active.states[state] & active.recomputes[recompute])
        for row in draw.permutation(on)[:2].tolist():
            at = np.array([row])
            floor, own = floor_of_branch(tables, state, recompute, swap, at)
            whole = tables.whole(state, recompute, swap)[at]
            table, least = (
                BlockTable(search.kinds, np.ascontiguousarray(values.transpose(1, 2, 0)), fields)
                for values, fields in ((whole, COMPACT), (floor, TIMES))
            )
            if own:
                times = whole[:, : len(TIMES)]
                assert np.all(np.abs(floor - times) <= 1e-12 * np.abs(times).max(axis=(0, 2), keepdims=True))
            micro_batches = tables.ctx.micro_batches[at]
            plain = [d for d in search.layouts_of(int(rows.values["pp"][row])) if d[1].virtual_stages == 1]
            schedule, layout = plain[draw.integers(len(plain))]
            by_layers = search.branches.by_layers(search.branches.recomputes[recompute])
            layers = int(draw.integers(1, layout.layers)) if by_layers and layout.layers > 1 else None
            bound_s = float(step_bound(least, layout, micro_batches, layers, order_of(schedule))[0])
            step_s = float(
                exact_step_s([table], layout, order_of(schedule), round(float(micro_batches[0])), [layers])[0]
            )
            assert bound_s <= step_s * (1 + 1e-9)
            below += not own
    assert below > 40
