"""Where the search adds up what a state and what recompute and swaps change, the sum is the branch's own ledger."""

from __future__ import annotations

import numpy as np
import pytest

from planner.solve.tables import BranchTables
from planner.solve.uniform import UniformSearch
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload


@pytest.mark.parametrize(
    ("model", "cluster"), [("llama3.1-8b", "h100-sxm:4x8"), ("deepseek-v2-lite", "h100-sxm:2x8")]
)
def test_sums_of_changes_are_the_branch(model: str, cluster: str) -> None:
    """Every state with every recompute choice and swap, on a spread of meshes."""
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
    branches = search.branches
    tables = BranchTables(
        search.space, branches, search.pricer, search.kinds, prefix, ctx, search.ledger(prefix, ctx)
    )
    active = branches.activity(rows, knobs)
    added, every = 0, np.arange(len(rows))
    for state in range(len(branches.states)):
        on = active.states[state]
        for recompute in range(len(branches.recomputes)):
            for swap in range(len(branches.swaps)):
                if not on.any():
                    continue
                total = tables.of_branch(state, recompute, swap, every)
                whole = tables.whole(state, recompute, swap)
                added += len(tables._parts(state, recompute, swap)) > 1
                scale = np.abs(whole).max(axis=(0, 2), keepdims=True) + np.abs(total).max(
                    axis=(0, 2), keepdims=True
                )
                names = {
                    slot: choice.value for slot, choice in branches.recipe(state, recompute, swap).items()
                }
                assert np.all(np.abs(total - whole)[on] <= 1e-12 * scale), names
    assert added > 40
