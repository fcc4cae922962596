"""Pools on devices of several types: exact numbers of replicas against trying all, and what the plans promise."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import linprog

from planner.errors import Infeasible, SpecError
from planner.serving.matching import Fleet, match
from planner.serving.replay import reprice
from planner.serving.serve import serve
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic


def random_fleet(seed):
    random = np.random.default_rng(seed)
    left, right = random.integers(1, 3, 2)
    return Fleet(
        random.integers(2, 5, 2).tolist(),
        random.choice([1.0, 2.0], left), random.integers(0, 2, left).astype(float), random.uniform(1.0, 4.0, left),
        random.choice([1.0, 2.0], right), random.integers(0, 2, right).astype(float), random.uniform(1.0, 4.0, right),
        random.uniform(0.5, 5.0, (left, right)), random.uniform(0.5, 5.0, right),
    )  # fmt: skip


def flow_of(fleet, x, y):
    """The largest flow through given replicas, by linear programming."""
    left, right = fleet.prompts.shape
    rows, limits = [], []
    for i in range(left):
        row = np.zeros((left, right))
        row[i] = 1.0 / fleet.prompts[i]
        rows.append(row.ravel())
        limits.append(x[i])
    for j in range(right):
        row = np.zeros((left, right))
        row[:, j] = 1.0
        rows.append(row.ravel())
        limits.append(y[j] * fleet.answers[j])
    return -linprog(-np.ones(left * right), A_ub=rows, b_ub=limits).fun


def every(fleet):
    """Rate and cost of every choice of replicas that the clusters hold."""
    left, right = fleet.prompts.shape
    for numbers in product(range(5), repeat=left + right):
        x, y = np.array(numbers[:left], dtype=float), np.array(numbers[left:], dtype=float)
        used = [
            x @ (fleet.left_size * (fleet.left_cluster == k))
            + y @ (fleet.right_size * (fleet.right_cluster == k))
            for k in range(len(fleet.devices))
        ]
        if all(n <= room for n, room in zip(used, fleet.devices, strict=True)):
            yield flow_of(fleet, x, y), float(x @ fleet.left_cost + y @ fleet.right_cost)


@pytest.mark.parametrize("seed", range(12))
def test_numbers_of_replicas_are_those_of_trying_all(seed):
    fleet = random_fleet(seed)
    tried = list(every(fleet))
    most = max(rate for rate, _ in tried)
    found = match(fleet)
    if most <= 0.0:
        assert found is None
        return
    assert found.rate_per_s == pytest.approx(most, rel=1e-6)
    cost = found.left @ fleet.left_cost + found.right @ fleet.right_cost
    assert cost == pytest.approx(min(c for rate, c in tried if rate >= most * (1 - 1e-7)), rel=1e-6)
    half = match(fleet, 0.5 * most)
    half_cost = half.left @ fleet.left_cost + half.right @ fleet.right_cost
    assert half_cost == pytest.approx(min(c for rate, c in tried if rate >= 0.5 * most - 1e-9), rel=1e-6)
    thrifty = match(fleet, thrifty=True)
    ratio = thrifty.rate_per_s / (thrifty.left @ fleet.left_cost + thrifty.right @ fleet.right_cost)
    assert ratio == pytest.approx(max(rate / c for rate, c in tried if c > 0.0), rel=1e-6)


def problem(**more):
    clusters = [load_cluster(name) for name in ("h100-sxm:1x4", "l40s:1x8")]
    traffic = more.pop("traffic", Traffic(2000, 200, ttft_s=1.0, tpot_s=0.04))
    return ServeProblem(
        load_model("llama3.1-8b"),
        clusters[0],
        traffic,
        load_stack("vllm"),
        others=tuple(clusters[1:]),
        **more,
    )


def test_two_types_answer_more_than_either_alone():
    both = serve(problem())
    assert both.best.optimality.status == "exact"
    assert {pool.cluster for pool in both.best.pools} == {c.name for c in problem().clusters}
    alone = [
        serve(replace(problem(), cluster=cluster, others=(), modes=("disaggregated",))).best
        for cluster in problem().clusters
    ]
    rates = [plan.estimate.goodput_requests_per_s for plan in alone]
    assert both.best.estimate.goodput_requests_per_s > max(rates)
    for plan in both.plans:
        for cluster in problem().clusters:
            used = sum(pool.devices for pool in plan.pools if pool.cluster == cluster.name)
            assert used <= cluster.devices
        assert plan.estimate.ttft_s["mean"] <= 1.0 + 1e-9
        assert plan.estimate.tpot_s["mean"] <= 0.04 + 1e-9


def test_a_rate_takes_the_cheapest_pools():
    wanted = Traffic(2000, 200, ttft_s=1.0, tpot_s=0.04, rate_per_s=4.0)
    plans = serve(problem(traffic=wanted, objective="usd")).plans
    prices = [plan.estimate.usd_per_million_output_tokens for plan in plans]
    assert prices == sorted(prices)
    assert plans[0].estimate.goodput_requests_per_s == pytest.approx(4.0)


def test_mixed_plans_are_priced_again():
    best = serve(problem()).best
    again = reprice(best)
    assert sorted((p.role, p.cluster, p.replicas, tuple(p.mesh.items())) for p in again.pools) == sorted(
        (p.role, p.cluster, p.replicas, tuple(p.mesh.items())) for p in best.pools
    )
    assert again.estimate.goodput_requests_per_s == pytest.approx(
        best.estimate.goodput_requests_per_s, rel=1e-6
    )


def test_what_several_clusters_cannot_do_is_said():
    for more in ({"modes": ("aggregated",)}, {"traffic": Traffic(2000, 200, concurrency=8)}):
        with pytest.raises(SpecError):
            problem(**more)


def test_the_lightest_load_is_told_and_found():
    """A limit just below what pools take at next to no load is missed by what is told; a little above that there is a plan."""
    with pytest.raises(Infeasible) as missed:
        serve(problem(traffic=Traffic(2000, 200, ttft_s=0.04, tpot_s=0.05)), top=1)
    told_s = float(str(missed.value).split("nothing is faster than ")[1].split(" ms")[0]) * 1e-3
    found = serve(problem(traffic=Traffic(2000, 200, ttft_s=1.02 * told_s, tpot_s=0.05)), top=1).best
    assert told_s < found.estimate.ttft_s["mean"] <= 1.02 * told_s


def test_a_longer_limit_answers_more_down_to_the_lightest_load():
    """What keeps a limit keeps every longer one; a limit that prompts just keep was once missed up to twice it.

    A load is as near to its limit as chains look for it, within 4 % of a latency, which is less than 1 % of the load here.
    """
    with pytest.raises(Infeasible) as missed:
        serve(problem(traffic=Traffic(2000, 200, ttft_s=0.03, tpot_s=0.05)), top=1)
    least_s = float(str(missed.value).split("nothing is faster than ")[1].split(" ms")[0]) * 1e-3
    goodput = []
    for limit_s in (1.02 * least_s, 1.1 * least_s, 1.3 * least_s, 1.6 * least_s, 0.1, 0.2):
        best = serve(problem(traffic=Traffic(2000, 200, ttft_s=limit_s, tpot_s=0.05)), top=1).best
        assert best.estimate.ttft_s["mean"] <= limit_s
        goodput.append(best.estimate.goodput_requests_per_s)
    assert all(more > 0.99 * less for less, more in pairwise(goodput))
    assert goodput[-1] > 3.0 * goodput[0]


def test_a_rate_just_below_what_all_answer_has_a_plan():
    """Replicas whose means carry a rate may miss the limits by chains; more of them share it."""
    limits = {"ttft_s": 0.1, "tpot_s": 0.05}
    most = serve(problem(traffic=Traffic(2000, 200, **limits)), top=1).best.estimate.goodput_requests_per_s
    for part in (0.3, 0.6, 0.9):
        wanted = Traffic(2000, 200, rate_per_s=part * most, **limits)
        best = serve(problem(traffic=wanted), top=1).best
        assert best.estimate.ttft_s["mean"] <= 0.1
        assert best.estimate.goodput_requests_per_s == pytest.approx(part * most)
        assert reprice(best).estimate.ttft_s["mean"] == pytest.approx(best.estimate.ttft_s["mean"], rel=1e-6)


@pytest.mark.parametrize("limits", [{"e2e_s": 2.0}, {"e2e_s": 3.0, "ttft_s": 0.4, "tpot_s": 0.012}])
def test_a_limit_of_whole_answers_is_split_as_the_pools_answer_most(limits):
    """No fixed split of the limit does better than the one that is found; what is stated as its gap bounds all of them."""
    traffic = Traffic(2000, 200, **limits)
    best = serve(problem(traffic=traffic)).best
    rate = best.estimate.goodput_requests_per_s
    assert best.estimate.e2e_s["mean"] <= traffic.e2e_s
    assert best.optimality.status == "gap"
    assert best.optimality.gap < 0.05
    for share in (0.5, 0.65, 0.8):
        first_s, token_s = (1.0 - share) * traffic.e2e_s, share * traffic.e2e_s / 199
        ttft_s, tpot_s = min(first_s, traffic.ttft_s or np.inf), min(token_s, traffic.tpot_s or np.inf)
        try:
            fixed = serve(problem(traffic=Traffic(2000, 200, ttft_s=ttft_s, tpot_s=tpot_s)), top=1).best
        except Infeasible:
            continue
        assert fixed.estimate.goodput_requests_per_s <= rate / (1.0 - best.optimality.gap) * (1 + 1e-9)


def test_the_lightest_whole_answer_is_told_and_found():
    with pytest.raises(Infeasible) as missed:
        serve(problem(traffic=Traffic(2000, 200, e2e_s=0.9)), top=1)
    told_s = float(str(missed.value).split("nothing is faster than ")[1].split(" ms")[0]) * 1e-3
    found = serve(problem(traffic=Traffic(2000, 200, e2e_s=1.1 * told_s)), top=1).best
    assert told_s < found.estimate.e2e_s["mean"] <= 1.1 * told_s
