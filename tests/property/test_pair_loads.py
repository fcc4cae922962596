"""A limit of whole answers and clients that replace answers couple two pools: the search equals trying all pairs and loads."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from planner.costs.serving import kv_transfer_s, queue_load
from planner.engine.pricer import Pricer
from planner.errors import Infeasible
from planner.serving.candidates import Account, iterations_of
from planner.serving.disaggregated import search_disaggregated
from planner.serving.numbers import Replicas, numbers_of
from planner.serving.pools import decode_kinds, prefill_kinds
from planner.serving.serve import serve
from planner.serving.space import ServeSpace, links_of, mesh_of
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.serve_problem import ServeProblem
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic

DEVICES = 4


def problem(traffic, model="llama3.1-8b", devices=DEVICES, **more):
    cluster = load_cluster(f"h100-sxm:1x{devices}")
    return ServeProblem(
        load_model(model), cluster, traffic, load_stack("vllm"), modes=("disaggregated",), **more
    )


def load_of(room_s, service_s, traffic):
    """M/D/1 by hand for means: W = ρD/(2(1 − ρ)) is ρ = 2W/(D + 2W); no more than 0.95."""
    if traffic.percentile is not None:
        return queue_load(room_s, service_s, traffic.percentile / 100.0, 0.95)
    room_s = np.minimum(room_s, 1e9)
    return np.where(room_s >= 0.0, np.minimum(2.0 * room_s / (service_s + 2.0 * room_s), 0.95), 0.0)


def rates(p, pre, i, dec, j, pricer):
    """Requests per second of one prefill and one decode replica, and of all clients, at every load that keeps all limits."""
    traffic, most = p.traffic, int(dec.kind.most[j])
    n = np.arange(1.0, most + 1.0)
    one = iterations_of(p, dec.kind.recipe, mesh_of(np.tile(dec.kind.rows[j], (most, 1))), pricer)
    each = n / one.ctx.mesh.pp
    step_s = one(
        np.maximum(n, 1.0) / one.ctx.mesh.pp, each * (traffic.isl + traffic.osl / 2.0), 0.0 * n, 0.0 * n
    )
    senders, receivers = (
        float(links_of(k.kind.rows[[row]], k.kind.recipe)[0]) for k, row in ((pre, i), (dec, j))
    )
    speed = p.cluster.tiers[-1].effective_bytes_per_s * min(senders, receivers)
    first_s = pre.batch_s[i] + kv_transfer_s(
        pre.bytes_[i] * senders, speed, pre.batch_s[i], float(p.model.n_layers)
    )
    first_s = first_s + float(pricer.stack.serving.admitted_s(traffic.isl))
    rest_s = (traffic.e2e_s or np.inf) - (traffic.osl - 1) * step_s
    room_s = np.minimum(rest_s, traffic.ttft_s or np.inf) - first_s
    load = load_of(room_s, pre.pace_s[i] * pre.prompts[i], traffic)
    kept = (load > 0.0) & (step_s <= (traffic.tpot_s or np.inf))
    cycle_s = first_s - float(pricer.stack.serving.admitted_s(traffic.isl)) + (traffic.osl - 1) * step_s
    clients = (traffic.concurrency or np.inf) / cycle_s
    return load[kept] / pre.pace_s[i], (n / ((traffic.osl - 1) * step_s))[kept], clients[kept]


def tried(p):
    """The best value of every two sizes of replicas, by trying everything."""
    pricer, traffic = Pricer(p.cluster, p.stack), p.traffic
    best = {}
    for pre, dec in product(
        prefill_kinds(p, ServeSpace(p, "prefill"), pricer, Account()),
        decode_kinds(p, ServeSpace(p, "decode"), pricer, Account()),
    ):
        for i, j in product(range(len(pre.batch_s)), range(len(dec.rate))):
            left, right = int(pre.kind.size[i]), int(dec.kind.size[j])
            if left + right > p.cluster.devices:
                continue
            prompts, answers, clients = rates(p, pre, i, dec, j, pricer)
            for x, y in product(range(1, p.cluster.devices + 1), repeat=2):
                used = x * left + y * right
                if used > p.cluster.devices or not len(prompts):
                    continue
                answered = float(np.minimum(np.minimum(x * prompts, y * answers), clients).max())
                if traffic.rate_per_s is not None:
                    answered = traffic.rate_per_s if answered >= traffic.rate_per_s else 0.0
                value = answered if p.machines_count else answered / used
                best[left, right] = max(best.get((left, right), 0.0), value)
    return {sizes: value for sizes, value in best.items() if value > 0.0}


def found(p):
    """The same by the search."""
    best = {}
    for split in search_disaggregated(p, Pricer(p.cluster, p.stack), Account()):
        sizes = tuple(int(np.prod(row[:3])) for row in split.rows)
        value = split.requests_per_s if p.machines_count else split.requests_per_s / split.devices
        best[sizes] = max(best.get(sizes, 0.0), value)
    return best


LIMITS = [
    {"e2e_s": 1.5},
    {"e2e_s": 2.5},
    {"e2e_s": 6.0},
    {"e2e_s": 2.0, "percentile": 90.0},
    {"e2e_s": 2.0, "ttft_s": 0.12, "tpot_s": 0.0085},
    {"e2e_s": 2.5, "rate_per_s": 20.0},
    {"e2e_s": 2.5, "concurrency": 40},
    {"concurrency": 40},
    {"concurrency": 100, "ttft_s": 0.3, "tpot_s": 0.012},
    {"e2e_s": 2.5, "ttft_s": 0.3, "tpot_s": 0.012, "rate_per_s": 8.0},
]


@pytest.mark.parametrize("objective", ["throughput", "usd"])
@pytest.mark.parametrize("limits", LIMITS)
def test_the_best_of_every_two_sizes_is_that_of_trying_everything(limits, objective):
    p = problem(Traffic(2000, 200, **limits), objective=objective)
    expected = tried(p)
    assert expected
    assert found(p) == pytest.approx(expected, rel=1e-9)


def test_short_prompts_and_long_answers_beside_eight_devices():
    p = problem(Traffic(300, 900, e2e_s=9.0), devices=8)
    assert found(p) == pytest.approx(tried(p), rel=1e-9)


def test_a_looser_limit_of_whole_answers_answers_more_and_is_kept():
    goodput = []
    for limit_s in (1.0, 1.5, 2.0, 4.0):
        best = serve(problem(Traffic(2000, 200, e2e_s=limit_s), devices=8), top=1).best
        assert best.optimality.status == "exact"
        assert 0.8 * limit_s < best.estimate.e2e_s["mean"] <= limit_s
        assert best.estimate.binding == "e2e"
        goodput.append(best.estimate.goodput_requests_per_s)
    assert goodput == sorted(goodput)


def test_the_bound_of_whole_answers_is_of_pools_that_stand_side_by_side():
    """Two devices hold two replicas of one device each: 199 tokens read 16.06 GB at most at 3.35 TB/s each."""
    p = problem(Traffic(2000, 200, e2e_s=0.5), devices=2)
    with pytest.raises(Infeasible) as refused:
        serve(p)
    told = re.search(r"nothing is faster than ([\d.]+) ms .*--e2e-ms ([\d.]+) fits", str(refused.value))
    nearest_s, fits_s = (float(x) * 1e-3 for x in told.groups())
    assert nearest_s > 199 * 2 * 8.03e9 / 3.35e12
    assert fits_s < 1.01 * nearest_s
    assert serve(replace(p, traffic=replace(p.traffic, e2e_s=fits_s))).plans


@pytest.mark.parametrize("asked", [(None, None), (2, None), (None, 3), (2, 3)])
@pytest.mark.parametrize(("objective", "rate_per_s"), [("throughput", None), ("usd", None), ("usd", 6.0)])
def test_numbers_of_replicas_are_those_of_trying_all(asked, objective, rate_per_s):
    """Where some are asked for, too: the others stand on the devices that are left."""
    p = problem(Traffic(2000, 200, rate_per_s=rate_per_s), devices=8, objective=objective)
    random = np.random.default_rng(7)
    prompts, answers = random.uniform(0.5, 8.0, (2, 80))
    left, right = 2.0 ** random.integers(0, 3, (2, 80))
    x, y = numbers_of(p, Replicas((prompts, answers), (left, right), asked))

    def value(a, b, k):
        answered, used = min(a * prompts[k], b * answers[k]), a * left[k] + b * right[k]
        if used > 8 or (rate_per_s is not None and answered < rate_per_s):
            return 0.0
        return (answered if rate_per_s is None else rate_per_s) / (1.0 if p.machines_count else used)

    counts = [range(1, 9) if n is None else (n,) for n in asked]
    for k in range(80):
        most = max(value(a, b, k) for a, b in product(*counts))
        assert (value(x[k], y[k], k) if x[k] > 0 else 0.0) == pytest.approx(most)
