"""Laws of serving: loads and latencies grow together, the search equals trying everything, its account adds up."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from planner.engine.pricer import Pricer
from planner.errors import Infeasible, SpecError
from planner.serving.aggregated import steady
from planner.serving.candidates import Account, iterations_of
from planner.serving.capacity import capacity
from planner.serving.daily import daily_fleet, over_a_day
from planner.serving.numbers import Replicas, _thriftiest
from planner.serving.search import search_aggregated
from planner.serving.serve import serve
from planner.serving.slots import Arrivals
from planner.serving.space import ServeSpace, mesh_of
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic


def problem(model="llama3.1-8b", cluster="h100-sxm:1x4", traffic=None, **more):
    traffic = traffic or Traffic(2000, 200, ttft_s=0.5, tpot_s=0.02)
    return ServeProblem(load_model(model), load_cluster(cluster), traffic, load_stack("vllm"), **more)


def test_throughput_and_latencies_grow_with_the_load():
    p = problem()
    rows = np.tile(ServeSpace(p).meshes[:1], (40, 1))
    iterations = iterations_of(
        p, next(iter(ServeSpace(p).recipes())), mesh_of(rows), Pricer(p.cluster, p.stack)
    )
    state = steady(iterations, p.traffic, np.arange(1.0, 161.0, 4.0), np.full(40, 8192.0))
    # A kernel's tiles are steps: where one begins, the rate may fall by less than a per cent.
    assert np.all(np.diff(state.requests_per_s) > -0.01 * state.requests_per_s[1:])
    assert np.all(np.diff(state.tpot_s) > 0)
    assert np.all(np.diff(state.ttft_s) > 0)
    assert np.all(state.ttft_at(0.99) >= state.ttft_at(0.9))


def test_little_s_law_holds():
    p = problem()
    row = ServeSpace(p).meshes[:1]
    iterations = iterations_of(
        p, next(iter(ServeSpace(p).recipes())), mesh_of(row), Pricer(p.cluster, p.stack)
    )
    state = steady(iterations, p.traffic, np.array([64.0]), np.array([8192.0]))
    in_flight = state.requests_per_s * (state.ttft_s + (p.traffic.osl - 1) * state.tpot_s)
    assert float(in_flight[0]) == pytest.approx(64.0, rel=0.03)


@pytest.mark.parametrize(
    "traffic", [Traffic(2000, 200, ttft_s=0.5, tpot_s=0.02), Traffic(500, 500, tpot_s=0.012, percentile=90.0)]
)
def test_the_search_is_as_good_as_trying_every_load(traffic):
    p = problem(traffic=traffic, modes=("aggregated",))
    space = ServeSpace(p)
    best = 0.0
    for recipe in space.recipes():
        for mesh in space.meshes:
            for chunk in space.chunks:
                row = mesh[None, :]
                pricer = Pricer(p.cluster, p.stack)
                one = iterations_of(p, recipe, mesh_of(row), pricer)
                most = int(capacity(one, traffic.isl, traffic.osl, float(chunk)).sequences[0])
                if most < 1:
                    continue
                loads = np.arange(1.0, most + 1.0)
                many = iterations_of(p, recipe, mesh_of(np.tile(row, (most, 1))), pricer)
                state = steady(many, traffic, loads, np.full(most, float(chunk)))
                end = np.full(most, most - 1)
                held = np.full(most, float(most))
                state = Arrivals(traffic, held, state.take(end), state.decode_s[0 * end], held).meet(state)
                q = None if traffic.percentile is None else traffic.percentile / 100.0
                ttft = state.ttft_s if q is None else state.ttft_at(q)
                tpot = state.tpot_s if q is None else state.tpot_at(q)
                kept = (ttft <= (traffic.ttft_s or np.inf)) & (tpot <= (traffic.tpot_s or np.inf))
                replicas = p.cluster.devices // int(mesh[0] * mesh[1] * mesh[2])
                if kept.any():
                    best = max(best, float((state.requests_per_s * replicas)[kept].max()))
    found = search_aggregated(p, space, Pricer(p.cluster, p.stack), 10, Account())[0]
    assert found.tokens_per_s / traffic.osl == pytest.approx(best, rel=1e-9)
    assert serve(p).best.optimality.status == "exact"


@pytest.mark.parametrize(
    "traffic",
    [
        Traffic(2000, 200, ttft_s=0.5, tpot_s=0.02),
        Traffic(2000, 200, ttft_s=0.2, tpot_s=0.01),
        Traffic(2000, 200, tpot_s=0.02, rate_per_s=5.0),
        Traffic(2000, 200, concurrency=64),
        Traffic(2000, 200, e2e_s=2.5),
        Traffic(2000, 200, e2e_s=2.5, rate_per_s=8.0),
    ],
)
@pytest.mark.parametrize("model", ["llama3.1-8b", "qwen3-30b-a3b"])
def test_every_candidate_is_accounted_for(model, traffic):
    report = serve(problem(model, traffic=traffic)).search
    assert report.candidates == report.scored + sum(report.excluded_by_bound.values()) + sum(
        report.rejected.values()
    )


def test_limits_are_kept_and_plans_are_ranked():
    for mode in ("aggregated", "disaggregated"):
        result = serve(problem(modes=(mode,)))
        rates = [plan.estimate.goodput_requests_per_s for plan in result.plans]
        assert rates == sorted(rates, reverse=True)
        for plan in result.plans:
            assert plan.mode == mode
            assert plan.estimate.ttft_s["mean"] <= 0.5 + 1e-9
            assert plan.estimate.tpot_s["mean"] <= 0.02 + 1e-9
            assert plan.devices <= 4
            assert plan.estimate.memory_bytes["peak"] <= plan.estimate.memory_budget_bytes * (1 + 1e-9)


def test_a_rate_takes_no_more_devices_than_it_needs():
    most = serve(problem()).best.estimate.goodput_requests_per_s
    few = serve(problem(traffic=Traffic(2000, 200, ttft_s=0.5, tpot_s=0.02, rate_per_s=most / 8))).best
    many = serve(problem(traffic=Traffic(2000, 200, ttft_s=0.5, tpot_s=0.02, rate_per_s=most * 0.9))).best
    assert few.devices < many.devices
    assert few.estimate.goodput_requests_per_s == pytest.approx(most / 8)


def test_tighter_limits_and_fewer_devices_never_answer_more():
    loose, tight = (serve(problem(traffic=Traffic(2000, 200, ttft_s=0.5, tpot_s=t))) for t in (0.03, 0.01))
    assert tight.best.estimate.goodput_requests_per_s <= loose.best.estimate.goodput_requests_per_s
    small = serve(problem(cluster="h100-sxm:1x2", traffic=Traffic(2000, 200, ttft_s=0.5, tpot_s=0.03)))
    assert small.best.estimate.goodput_requests_per_s <= loose.best.estimate.goodput_requests_per_s


def test_cached_prefixes_help():
    traffic = Traffic(8000, 200, ttft_s=1.0, tpot_s=0.03)
    without, hit = (serve(problem(traffic=replace(traffic, prefix_hit=h))).best for h in (0.0, 0.6))
    assert hit.estimate.goodput_requests_per_s > 1.2 * without.estimate.goodput_requests_per_s


def refusal(p):
    with pytest.raises(Infeasible) as info:
        serve(p)
    return str(info.value)


def test_what_cannot_be_kept_says_what_comes_nearest_and_that_fits():
    late = refusal(problem(traffic=Traffic(2000, 200, tpot_s=1e-4)))
    assert "times the limit" in late
    fits = float(re.search(r"--tpot-ms ([0-9.]+) fits", late)[1])
    assert serve(problem(traffic=Traffic(2000, 200, tpot_s=fits * 1e-3))).plans
    big = refusal(problem("llama3.1-405b", "h100-sxm:1x4", Traffic(2000, 200)))
    assert "device memory" in big
    larger = re.search(r"--cluster (\S+) fits", big)[1]
    assert serve(problem("llama3.1-405b", larger, Traffic(2000, 200))).plans
    wanted = Traffic(2000, 200, tpot_s=0.02, rate_per_s=1e3)
    for modes in (("aggregated",), ("disaggregated",)):
        busy = refusal(problem(traffic=wanted, modes=modes))
        less = float(re.search(r"--rate ([0-9.]+) fits", busy)[1])
        assert serve(problem(traffic=replace(wanted, rate_per_s=less), modes=modes)).plans
        larger = re.search(r"--cluster (\S+) fits", busy)[1]
        assert serve(problem(cluster=larger, traffic=wanted, modes=modes)).plans


def test_more_clients_than_slots_wait_outside():
    """Little's law over all clients: answers take as long as clients over rate."""
    traffic = Traffic(2000, 200, concurrency=2000)
    best = serve(problem(traffic=traffic, modes=("aggregated",), fixed={"tp": 4})).best
    estimate = best.estimate
    assert estimate.max_concurrency < 2000
    assert estimate.binding in ("memory", "sequences")
    assert estimate.goodput_requests_per_s * estimate.e2e_s["mean"] == pytest.approx(2000, rel=0.05)


def test_unknown_choices_are_refused():
    for fixed in ({"tpp": 2}, {"tp": "two"}, {"weights": "int3"}, {"mode": "both"}):
        with pytest.raises(SpecError):
            serve(problem(fixed=fixed))
    with pytest.raises(SpecError, match="matches no knob"):
        serve(problem(forbidden=("tq=*",)))


def test_fixed_and_forbidden_choices_are_kept():
    plans = serve(problem(fixed={"tp": 2, "chunk_tokens": 2048}, modes=("aggregated",))).plans
    assert {(plan.pools[0].mesh["tp"], plan.pools[0].knobs["chunk_tokens"]) for plan in plans} == {(2, 2048)}
    plans = serve(problem(forbidden=("pp=*",), fixed={"pp": 1})).plans
    assert {pool.mesh["pp"] for plan in plans for pool in plan.pools} == {1}
    split = serve(problem(fixed={"prefill.tp": 1, "decode.tp": 2}, modes=("disaggregated",))).best
    assert [pool.mesh["tp"] for pool in split.pools] == [1, 2]


def test_the_front_is_one():
    result = serve(problem())
    points = [(p["output_tokens_per_s_per_device"], p["output_tokens_per_s_per_user"]) for p in result.pareto]
    assert len(points) > 5
    assert points == sorted(points, reverse=True)
    users = [user for _, user in points]
    assert users == sorted(users)
    # Means on a grid of loads: within a few per cent of the best plan's own point.
    best = result.best.estimate
    reached = [device for device, user in points if user >= best.output_tokens_per_s_per_user]
    assert max(reached) > 0.8 * best.output_tokens_per_s_per_device
    for point in result.pareto:
        used = sum(
            p["replicas"] * p["mesh"]["tp"] * p["mesh"]["pp"] * p["mesh"]["dp"] for p in point["pools"]
        )
        assert 1 <= used <= 4


def test_dollars_and_joules_are_of_the_devices_that_a_plan_uses():
    many, thrifty, cool = (
        serve(problem(objective=name)).best.estimate for name in ("throughput", "usd", "energy")
    )
    assert thrifty.usd_per_million_output_tokens <= many.usd_per_million_output_tokens * (1 + 1e-9)
    assert cool.joules_per_output_token <= many.joules_per_output_token * (1 + 1e-9)
    assert many.goodput_requests_per_s >= thrifty.goodput_requests_per_s * (1 - 1e-9)


def test_the_thriftiest_numbers_of_replicas_are_those_of_trying_all():
    random = np.random.default_rng(4)
    prompts, answers = random.uniform(0.5, 8.0, (2, 60))
    left, right = 2.0 ** random.integers(0, 4, (2, 60))
    x, y = _thriftiest(32, Replicas((prompts, answers), (left, right)))
    for k in range(60):
        value = {
            (a, b): min(a * prompts[k], b * answers[k]) / (a * left[k] + b * right[k])
            for a, b in product(range(1, 33), range(1, 33))
            if a * left[k] + b * right[k] <= 32
        }
        assert value[int(x[k]), int(y[k])] == pytest.approx(max(value.values()))


def test_a_day_takes_replicas_for_every_period():
    """By hand: 10 requests/s a replica of one device; 1, 11 and 25 with a fifth beside them are 1, 2 and 3 replicas."""
    plan = serve(problem(fixed={"tp": 1, "pp": 1}, modes=("aggregated",))).best
    estimate = replace(plan.estimate, goodput_requests_per_s=10.0 * plan.pools[0].replicas)
    day = daily_fleet(replace(plan, estimate=estimate), (1.0, 11.0, 25.0), 0.2, 2.0)
    assert [period["replicas"] for period in day["periods"]] == [[1], [2], [3]]
    assert day["device_hours"] == pytest.approx((1 + 2 + 3) * 8.0)
    assert day["usd"] == pytest.approx(96.0)
    assert day["saved"] == pytest.approx(1.0 - 2.0 / 3.0)
    assert day["periods"][1]["utilization"] == pytest.approx(11 / 20)
    days = over_a_day(serve(problem()), problem(), (5.0, 500.0), 0.0)
    assert [d["device_hours"] for d in days.days] == sorted(d["device_hours"] for d in days.days)
    assert days.days[0]["missing_devices"] == days.days[0]["peak_devices"] - problem().cluster.devices > 0
