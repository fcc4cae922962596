"""The search's winner is the best of the whole space, priced one candidate at a time through its own ledger."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from planner.engine.block_table import tabulate
from planner.engine.pricer import Pricer
from planner.errors import Infeasible
from planner.operators.baseline import EMBEDDING, HEAD, block_order
from planner.pipeline.composer import memory, step_bound, tight_bound
from planner.pipeline.layout import BOUNDARY
from planner.pipeline.step_time import exact_step_s
from planner.plans.plan import Plan
from planner.solve.front import pareto_front
from planner.solve.train import search, search_strictly
from planner.solve.uniform import UniformSearch
from planner.specs.cluster import Cluster
from planner.specs.hardware import load_cluster
from planner.specs.model import Attention, Block, Mlp, Model, Moe
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.uncertainty.residuals import load_residuals

PROBLEMS = 200
OPEN = {  # slots that a random problem may leave open; the others are fixed at the first value
    "sequence_parallel": ["false"],
    "context": ["p2p"],
    "tensor_overlap": ["none"],
    "zero_stage": ["0", "1", "2", "3"],
    "zero_group": ["full"],
    "recompute": ["none"],
    "optimizer_offload": ["none", "none", "none", "cpu"],
    "activation_offload": ["none", "none", "none", "cpu"],
    "parameter_offload": ["none"],
    "schedule": ["1f1b", "gpipe"],
}


def random_problem(seed: int) -> Problem:
    """A small model on a few devices, with memory anywhere between ample and far too little."""
    draw = random.Random(seed)
    heads = draw.choice([4, 8])
    experts = draw.choice([0, 0, 0, 4])
    block = Block(
        attention=Attention(heads, draw.choice([1, 2, heads]), 64),
        mlp=None if experts else Mlp(draw.choice([512, 1024]), gated=draw.random() < 0.5),
        moe=Moe(experts, 2, 512) if experts else None,
    )
    model = Model(
        name=f"random-{seed}", family="random", arch="decoder", hidden=heads * 64, vocab=draw.choice([1000, 32000]),
        max_seq_len=4096, blocks={"decoder": block}, layers=(("decoder", draw.choice([2, 3, 4])),),
        tied_embeddings=draw.random() < 0.3, dropout=draw.random() < 0.3,
    )  # fmt: skip
    cluster = load_cluster(
        draw.choice(
            ["h100-sxm:1x2", "h100-sxm:1x2", "rtx-4090:1x2", "a100-sxm-80gb:1x4", "a100-sxm-80gb:2x2"]
        )
    )
    # Recompute and what moves activations pull at each other: both open, often.
    some = draw.sample(sorted(OPEN), k=draw.choice([1, 1, 2]))
    free = ["recompute", "activation_offload"] if draw.random() < 0.2 else some
    fixed = {slot: draw.choice(values) for slot, values in OPEN.items() if slot not in free}
    if draw.random() < 0.8 or "recompute" in free:  # a dozen choices by themselves
        fixed["micro_batch_size"] = draw.choice([1, 2])
    budget = 2.3e9 + draw.choice([0.05e9, 0.2e9, 0.5e9, 5e9, 20e9])
    reserve = max(0.0, 1.0 - budget / float(cluster.device.memory_bytes))
    workload = TrainWorkload(draw.choice([8, 16, 24]), draw.choice([512, 2048]))
    if draw.random() < 0.5:  # a device that ends there: now the chance of running out of memory counts
        return Problem(model, with_memory(cluster, budget), workload, load_stack(), fixed=fixed)
    return Problem(model, cluster, workload, load_stack(), fixed=fixed, reserve=reserve)


def with_memory(cluster: Cluster, n_bytes: float) -> Cluster:
    """The cluster with so much memory per device."""
    (group,) = cluster.groups
    device = replace(group.device, memory_bytes=replace(group.device.memory_bytes, value=n_bytes))
    return replace(cluster, groups=(replace(group, device=device),))


def oom_chance(problem: Problem, peak_bytes: float, software_bytes: float) -> float:
    """How likely a measured peak exceeds the device's memory."""
    residuals = load_residuals()
    assert residuals is not None
    spread = residuals.peak.at(software_bytes / peak_bytes)
    return spread.probability_above(peak_bytes, float(problem.cluster.device.memory_bytes))


def all_candidates(problem: Problem):
    """(step time or None where it does not fit, bounds) of every candidate, each from a ledger of its own."""
    search_ = UniformSearch(problem, 1, lambda batch: [])
    space = search_.space
    kinds = (*dict.fromkeys(block_order(problem.model)), EMBEDDING, HEAD, BOUNDARY)
    pricer = Pricer(problem.cluster, problem.stack)
    budget = problem.memory_budget_bytes
    for prefix, branch in product(space.prefixes(), space.branches()):
        recipe = {**prefix, **branch}
        knobs = space.knobs(recipe)
        for number in range(len(space.rows)):
            rows = space.rows.take(np.array([number]))
            ctx = rows.context(problem, knobs)
            techniques = [c.technique for c in recipe.values() if c.technique is not None]
            if search_.faults(prefix, ctx).reasons or not all(
                np.all(k.ok) for t in techniques for k in t.valid(ctx)
            ):
                continue
            table = tabulate(search_.ledger(recipe, ctx), pricer, kinds, 1)
            groups = sum(float(rows.values[name][0] > 1) for name in ("tp", "cp", "dp", "pp", "ep"))
            m = ctx.micro_batches
            for schedule, layout in search_.layouts_of(int(ctx.mesh.pp[0])):
                order = schedule.technique.order
                if not all(np.all(check.ok) for check in schedule.technique.valid(ctx)):
                    continue
                by_layers = recipe["recompute"].value == "block"
                for layers in range(1, layout.layers) if by_layers else [None]:
                    step_s = float(exact_step_s([table], layout, order, round(float(m[0])), [layers])[0])
                    peak, software, slower = memory(table, layout, order, m, problem.stack, groups, layers)
                    bound_s = float(step_bound(table, layout, m, layers)[0])
                    tight_s = float(
                        tight_bound(
                            table, layout, order, m, np.array([np.inf if layers is None else layers])
                        )[0]
                    )
                    fits = peak[0] <= budget and all(
                        slower[tier][0] <= room for tier, room in problem.cluster.slower_bytes.items()
                    )
                    fits &= oom_chance(problem, float(peak[0]), float(software[0])) <= problem.max_oom_risk
                    yield (step_s if fits else None), max(bound_s, tight_s), step_s


@pytest.mark.parametrize("batch", range(10))
def test_winner_is_brute_force_winner(batch: int) -> None:
    """On random small problems: same best step time, same infeasibility, every candidate counted, every bound below."""
    for seed in range(batch, PROBLEMS, 10):
        winner_is_brute_force_winner(random_problem(seed), seed)


def test_the_best_step_never_grows_with_memory_or_with_faster_links() -> None:
    """A machine that has more of one thing runs every plan of the smaller one no slower."""

    def step_s(problem: Problem) -> float:
        try:
            return search_strictly(problem, top=1).best.estimate.step_time_s
        except Infeasible:
            return np.inf

    faster_some = 0
    for seed in range(24):
        problem = random_problem(seed)
        plain_s = step_s(problem)
        tiers = tuple(
            replace(t, bytes_per_s=2 * t.bytes_per_s, transport=None) for t in problem.cluster.tiers
        )
        same = tuple(replace(t, transport=None) for t in problem.cluster.tiers)
        slow, fast = (
            step_s(replace(problem, cluster=replace(problem.cluster, tiers=some))) for some in (same, tiers)
        )
        link = replace(problem.cluster, host_link_bytes_per_s=2 * problem.cluster.host_link_bytes_per_s)
        assert fast <= slow * (1 + 1e-9), seed
        assert step_s(replace(problem, cluster=link)) <= plain_s * (1 + 1e-9), seed
        roomy_s = step_s(replace(problem, reserve=0.9 * problem.reserve))
        assert roomy_s <= plain_s * (1 + 1e-9), seed
        faster_some += fast < slow or roomy_s < plain_s
    assert faster_some


def test_an_update_that_hides_may_win_where_the_plain_plan_fits() -> None:
    """With a host that is half as fast as the device, updates beside the backward are faster than updates on the device."""
    won = 0
    for seed in range(8):
        problem = random_problem(seed)
        rate = 0.5 * float(problem.cluster.device.memory_bytes_per_s)
        cluster = replace(
            problem.cluster, host_memory_bytes_per_s=rate, host_link_bytes_per_s=rate, nvme_bytes_per_s=rate
        )
        fixed = {k: v for k, v in problem.fixed.items() if k != "optimizer_offload"} | {"zero_stage": "2"}
        problem = replace(problem, cluster=cluster, fixed=fixed, explore=("optimizer_offload=*",))
        best = winner_is_brute_force_winner(problem, seed)
        won += best is not None and best.knobs["optimizer_offload"].endswith("overlapped")
    assert won >= 2


def winner_is_brute_force_winner(problem: Problem, seed: int) -> Plan | None:
    """Checks the search against every candidate on its own; returns the best plan, if any fits."""
    every = list(all_candidates(problem))
    assert all(bound_s <= step_s * (1 + 1e-9) for _, bound_s, step_s in every), seed
    fitting = [step_s for step_s, _, _ in every if step_s is not None]
    if not fitting:
        with pytest.raises(Infeasible):
            search_strictly(problem)
        return None
    result = search_strictly(problem)
    report = result.search
    counted = report.scored + sum(report.excluded_by_bound.values()) + sum(report.rejected.values())
    assert report.candidates == counted, seed
    assert result.best.estimate.step_time_s == pytest.approx(min(fitting), rel=1e-9), seed
    assert result.best.optimality.status == "exact"
    assert result.best.estimate.fits
    assert all((plan.estimate.oom_probability or 0.0) <= problem.max_oom_risk + 1e-9 for plan in result.plans)
    return result.best


def test_front_trades_time_for_memory() -> None:
    """Along the front memory falls and time rises, and each point is the best under its own peak."""
    problem = random_problem(5)
    problem = replace(problem, reserve=0.0)
    best = search(problem, top=1).best
    front = pareto_front(problem, best, points=3)
    times = [plan.estimate.step_time_s for plan in front]
    peaks = [plan.estimate.memory_bytes["peak"] for plan in front]
    assert times == sorted(times)
    assert peaks == sorted(peaks, reverse=True)
    for plan, peak in zip(front, peaks, strict=True):
        reserve = 1.0 - peak * (1 + 1e-9) / float(problem.cluster.device.memory_bytes)
        again = search(replace(problem, reserve=reserve), top=1).best
        assert again.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=1e-9)
