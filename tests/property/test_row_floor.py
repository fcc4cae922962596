"""What bounds rows before they have a ledger of their own is below them, and what rows share is what each has alone."""

from __future__ import annotations

import numpy as np
import pytest

from planner.engine.block_table import COMPACT, tabulate
from planner.pipeline.composer import phase_seconds
from planner.pipeline.layout import BOUNDARY
from planner.solve.prefixes import Alike, priced_alike
from planner.solve.row_floor import RowFloor
from planner.solve.uniform import UniformSearch
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload

JOBS = [
    ("llama3.1-8b", "h100-sxm:4x8", 96),
    ("deepseek-v2-lite", "h800:4x8", 64),
    ("mixtral-8x7b", "a100-sxm-80gb:4x8", 64),
]


@pytest.mark.parametrize(("model", "cluster", "batch"), JOBS)
def test_rows_that_share_prices_cost_what_they_cost_alone_and_no_less_than_their_floor(
    model: str, cluster: str, batch: int
) -> None:
    """Every prefix on a spread of all meshes and micro-batches: its shared table is that of a ledger of all rows, and the mean
    work of a step's devices, blocks' forwards and backwards alone, is no less than the floor."""
    problem = Problem(load_model(model), load_cluster(cluster), TrainWorkload(batch, 4096), load_stack())
    search = UniformSearch(problem, 1, lambda batch: [])
    rows = search.space.rows
    rows = rows.take(np.arange(0, len(rows), max(1, len(rows) // 400)))
    floor, alike = RowFloor(rows, search.blocks), Alike(rows)
    assert len(alike.first) < len(rows)
    counts = np.array([0.0 if kind == BOUNDARY else n for kind, n in search.blocks.items()])
    tight = 0.0
    for recipe in search.space.prefixes():
        ctx = rows.context(problem, search.space.knobs(recipe))
        at = np.flatnonzero(search.faults(recipe, ctx).first < 0)
        if not len(at):
            continue
        ledger = search.ledger(recipe, ctx)
        table, *_ = priced_alike(ledger, ctx, at, alike, search.pricer, search.kinds)
        mesh = ctx.mesh.take(at)
        whole = tabulate(ledger.take(at, mesh.counterpart), search.pricer, search.kinds, len(at), COMPACT)
        assert np.array_equal(table.values, whole.values)

        def on(some, recipe=recipe):
            ctx = some.context(problem, search.space.knobs(recipe))
            return search.ledger(recipe, ctx), ctx

        name = tuple(choice.value for choice in recipe.values())
        least_s = floor.seconds(name, at, batch, on, search.pricer)
        forward, backward, _ = phase_seconds(whole)
        work_s = ctx.micro_batches[at] * (counts @ (forward + backward)) / rows.values["pp"][at]
        assert np.all(least_s <= work_s)
        tight = max(tight, float(np.max(least_s / work_s)))
    assert tight > 0.9


def test_a_group_that_differs_sets_its_block_apart() -> None:
    """The hop between stages depends on their number, a layer's kernels do not."""
    problem = Problem(
        load_model("llama3.1-8b"),
        load_cluster("h100-sxm:2x8"),
        TrainWorkload(64, 4096),
        load_stack(),
        fixed={"cp": "1"},
    )
    search = UniformSearch(problem, 1, lambda batch: [])
    recipe = next(search.space.prefixes())
    ctx = search.space.rows.context(problem, search.space.knobs(recipe))
    apart = Alike(search.space.rows).apart(search.ledger(recipe, ctx), search.pricer)
    assert (BOUNDARY, False) in apart
    assert ("decoder", False) not in apart
