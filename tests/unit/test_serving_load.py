"""Levels of load: the simulator against queueing theory, and fixed point and chain against the simulator.

Runs are random: a mean may miss by its own stated error (95 % of means do not; the margin below is twice that), plus what an
iteration is too coarse for where theory has continuous time.
"""

from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest

from planner.costs.queueing import batch_response_s, erlang_c, mg1_wait_s, mmc_wait_s, processor_sharing_s
from planner.errors import Infeasible, SpecError
from planner.load.chain import percentiles
from planner.load.fixed_point import highest_load, steady_load
from planner.load.iteration_time import Affine
from planner.load.length_law import LengthLaw
from planner.load.requests import Lengths, draw, read_trace
from planner.load.results import Latency, summarize
from planner.load.scheduler import Scheduler, scheduler
from planner.load.simulator import simulate

UNLIMITED = 10**9


def run(price, rules, lengths, rate, count=60_000, seed=0, arrival_cv2=1.0):
    asked = draw(lengths, count, rate_per_s=rate, arrival_cv2=arrival_cv2, seed=seed)
    return summarize(simulate(asked, price, rules), 0.1), asked


# -- the simulator against theory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_cv2", [0.0, 1.0, 3.0])
def test_one_slot_is_m_g_1(output_cv2):
    """M/D/1, M/M/1 and M/G/1 (Pollaczek–Khinchine): one request at a time, 1 ms for each of its tokens, the first included."""
    found, asked = run(Affine(1e-3), Scheduler(max_requests=1), Lengths(1, 100, output_cv2=output_cv2), 6.0)
    service_s = 1e-3 * asked.output_tokens
    expected_s = mg1_wait_s(6.0, np.mean(service_s), np.var(service_s) / np.mean(service_s) ** 2)
    assert found.ttft_s.mean - 1e-3 == pytest.approx(expected_s, abs=2 * found.ttft_s.mean_error)
    assert found.ttft_s.mean_error < 0.2 * expected_s


@pytest.mark.parametrize("output_cv2", [0.0, 4.0])
def test_iterations_as_long_as_their_batch_are_processor_sharing(output_cv2):
    """M/G/1-PS: 1 ms per request in the iteration, as many as come; the law of lengths does not matter."""
    found, asked = run(
        Affine(1e-9, 1e-3, 0.0, 1e-3),
        Scheduler(max_requests=UNLIMITED, token_budget=UNLIMITED),
        Lengths(1, 200, output_cv2=output_cv2),
        3.0,
    )
    expected_s = processor_sharing_s(3.0, 1e-3 * np.mean(asked.output_tokens))
    rest_s = (
        1e-3 * 3.0 * expected_s
    )  # an arrival waits for the iteration at hand: one token of each request in it
    assert found.e2e_s.mean == pytest.approx(expected_s, abs=2 * found.e2e_s.mean_error + rest_s)
    assert found.e2e_s.mean_error < 0.1 * expected_s


def test_equal_iterations_with_slots_are_erlang_c():
    """M/M/c: 5 slots, iterations of 1 ms whatever they hold, exponential outputs of 200 tokens."""
    found, asked = run(Affine(1e-3), Scheduler(max_requests=5), Lengths(1, 201, output_cv2=1.0), 20.0)
    service_s = 1e-3 * np.mean(asked.output_tokens)
    wait_s = mmc_wait_s(20.0, service_s, 5)
    rest_s = 1e-3  # slots come free at the end of an iteration
    assert found.ttft_s.mean - 1e-3 == pytest.approx(wait_s, abs=2 * found.ttft_s.mean_error + rest_s)
    first = simulate(asked, Affine(1e-3), Scheduler(max_requests=5))
    waited = np.mean(first.first_token_s - asked.arrival_s > 2.5e-3)
    assert waited == pytest.approx(erlang_c(5, 20.0 * service_s), abs=0.03)


@pytest.mark.parametrize("rate", [0.2, 2.0, 5.0])
def test_a_static_batch_of_all_that_wait_is_inoues_queue(rate):
    """Inoue's Theorem 2 is an upper bound, tight to 3 % at these loads (arXiv:1912.06322, figure 4)."""
    price = Affine(1.0, 0.0, 0.0, 0.1)
    found, _ = run(price, scheduler("static", max_requests=UNLIMITED), Lengths(1, 1), rate, count=40_000)
    bound_s = batch_response_s(rate, 0.1, 1.0)
    assert found.ttft_s.mean <= bound_s + 2 * found.ttft_s.mean_error
    assert found.ttft_s.mean >= 0.97 * bound_s - 2 * found.ttft_s.mean_error


def test_bursts_wait_longer():
    price, lengths = Affine(10e-3, 0.0, 0.0, 90e-6), Lengths(1000, 50)
    even, bursty = (
        run(price, scheduler("vllm"), lengths, 6.0, 8000, arrival_cv2=cv2)[0] for cv2 in (0.0, 8.0)
    )
    assert bursty.ttft_s.p99 > 3 * even.ttft_s.p99


def test_a_closed_loop_keeps_its_concurrency():
    """Little's law: requests = rate · response, in a loop that is never short of requests."""
    asked = draw(Lengths(500, 100, output_cv2=1.0), 4000, seed=1)
    found = summarize(
        simulate(asked, Affine(10e-3, 1e-4, 0.0, 5e-5), scheduler("sarathi"), concurrency=24), 0.1
    )
    assert found.requests_per_s * found.e2e_s.mean == pytest.approx(24, rel=0.03)


def test_the_simulator_is_fast():
    asked = draw(Lengths(1000, 200, 1.0, 1.0), 3000, rate_per_s=4.0, seed=1)
    start = perf_counter()
    found = simulate(asked, Affine(12e-3, 60e-6, 1e-7, 90e-6), scheduler("sarathi"))
    assert found.request_iterations / (perf_counter() - start) > 200_000


# -- fixed point and chain against the simulator -------------------------------------------------------------------------------

POOL = Affine(12e-3, 60e-6, 0.0, 90e-6)
CHAT = Affine(11e-3, 3e-5, 2e-8, 3e-5, 2e-10)
SETTINGS = {
    "chunks": (POOL, scheduler("sarathi", 256, 2048), Lengths(1000, 200), 5.0),
    "small chunks": (POOL, scheduler("sarathi", 256, 512), Lengths(1000, 200, 1.0, 1.0), 4.0),
    "prompts first": (CHAT, scheduler("vllm", 256, 4096), Lengths(1200, 250, 2.0, 1.0), 10.0),
    "whole prompts": (CHAT, scheduler("orca", 256), Lengths(700, 300, 0.5, 4.0), 14.0),
    "few slots": (CHAT, scheduler("sarathi", 12, 2048), Lengths(300, 200, 0.0, 1.0), 3.6),
    "cached prefix": (CHAT, scheduler("vllm", 256, 8192), Lengths(3000, 100, 1.0, 0.5, prefix_hit=0.6), 9.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_levels_agree(name):
    """The bars of the module's claims: TPOT within 5 %, the 99th percentile of TTFT within 15 % and the simulator's own error."""
    price, rules, lengths, rate = SETTINGS[name]
    found, _ = run(price, rules, lengths, rate, count=40_000)
    point, chain = steady_load(price, rules, lengths, rate), percentiles(price, rules, lengths, rate)
    assert point.tpot_s[0] == pytest.approx(found.tpot_s.mean, rel=0.05)
    assert chain.tpot_s["mean"] == pytest.approx(found.tpot_s.mean, rel=0.05)
    margin = 0.15 * found.ttft_s.p99 + found.ttft_s.p99_error
    assert chain.ttft_s["p99"] == pytest.approx(found.ttft_s.p99, abs=margin)
    assert found.ttft_s.p99_error < 0.35 * found.ttft_s.p99
    assert chain.ttft_s["p50"] == pytest.approx(found.ttft_s.p50, rel=0.15)


def test_a_small_token_budget_is_what_binds():
    """At 8 requests/s of 1,000 + 200 tokens a budget of 512 does not keep up and one of 2,048 does, as simulated."""
    lengths = Lengths(1000, 200)
    load = steady_load(POOL, scheduler("sarathi", 4096), lengths, 8.0, token_budget=np.array([512.0, 2048.0]))
    assert load.binding.tolist() == ["tokens", "tokens"]
    assert load.most_per_s[0] < 8.0 < load.most_per_s[1]
    assert load.ttft_s[0] == np.inf
    waits = [
        summarize(
            simulate(draw(lengths, 3000, rate_per_s=8.0), POOL, scheduler("sarathi", 4096, c))
        ).ttft_s.p90
        for c in (512, 2048)
    ]
    assert waits[0] > 5 * waits[1]


def test_pools_are_balanced_together_as_alone():
    columns = Affine(np.array([[5e-3], [12e-3], [30e-3]]), 60e-6, 0.0, 90e-6)
    rules, lengths = scheduler("vllm", 128, 4096), Lengths(800, 150, 1.0, 2.0)
    together = steady_load(columns, rules, lengths, 4.0)
    for row, base_s in enumerate((5e-3, 12e-3, 30e-3)):
        alone = steady_load(replace(POOL, base_s=base_s), rules, lengths, 4.0)
        assert together.tpot_s[row] == pytest.approx(alone.tpot_s[0])
        assert together.ttft_s[row] == pytest.approx(alone.ttft_s[0])


def test_thousands_of_pools_are_balanced_in_a_moment():
    random = np.random.default_rng(0)
    columns = Affine(random.uniform(5e-3, 30e-3, (5000, 1)), 60e-6, 1e-9, 9e-5)
    start = perf_counter()
    load = highest_load(columns, scheduler("sarathi", 256), Lengths(1000, 200), ttft_s=1.0, tpot_s=0.05)
    assert perf_counter() - start < 2.0
    by_speed = load.rate_per_s[np.argsort(columns.base_s[:, 0])]
    assert np.all(np.diff(by_speed) <= 1e-3 * by_speed[1:])  # slower pools serve less, up to the halvings


def test_the_highest_load_keeps_the_limits():
    rules, lengths = scheduler("sarathi", 256, 2048), Lengths(1000, 200)
    best = highest_load(POOL, rules, lengths, tpot_s=0.025)
    assert best.tpot_s[0] == pytest.approx(0.025, rel=0.02)
    assert highest_load(POOL, rules, lengths, tpot_s=0.011).rate_per_s.tolist() == [0.0]


def test_what_has_no_chain_is_refused():
    with pytest.raises(SpecError, match="Use the simulator"):
        percentiles(POOL, scheduler("static"), Lengths(100, 100), 1.0)
    with pytest.raises(Infeasible, match=r"beyond what the pool serves; expected less than \d"):
        percentiles(POOL, scheduler("sarathi"), Lengths(1000, 200), 50.0)


# -- pieces ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cv2", [0.3, 1.0, 4.0])
def test_gamma_law(cv2):
    """Against a million draws of numpy's generator."""
    law = LengthLaw.of(100.0, cv2)
    drawn = np.random.default_rng(1).gamma(1 / cv2, 100.0 * cv2, 10**6)
    at = np.quantile(drawn, [0.1, 0.5, 0.9, 0.99])
    np.testing.assert_allclose(np.interp(at, law.points, law.below), [0.1, 0.5, 0.9, 0.99], atol=3e-3)
    chance = law.on_grid(25.0, 200)
    assert np.sum(chance) == pytest.approx(1.0)
    assert 25.0 * chance @ np.arange(200) == pytest.approx(100.0, rel=1e-3)


def test_errors_of_independent_numbers_are_those_of_the_textbook():
    """Standard normal numbers: the mean's half-width is 1.96/√n, the median's √(π/2) times that, whatever the batches."""
    drawn = np.random.default_rng(2).normal(10.0, 1.0, 100_000)
    latency = Latency.of(drawn)
    assert latency.mean_error == pytest.approx(1.96 / np.sqrt(100_000), rel=0.5)
    assert latency.p50_error == pytest.approx(1.96 * np.sqrt(np.pi / 2) / np.sqrt(100_000), rel=0.5)


HEADERS = ["arrival_s,prompt_tokens,output_tokens", "arrived_at,num_prefill_tokens,num_decode_tokens"]


@pytest.mark.parametrize("header", HEADERS)
def test_traces_are_read(tmp_path, header):
    (tmp_path / "t.csv").write_text(f"{header}\n7.5,20,3\n5,10,2\n")
    asked = read_trace(tmp_path / "t.csv")
    assert asked.arrival_s.tolist() == [0.0, 2.5]
    assert asked.prompt_tokens.tolist() == [10, 20]


def test_azure_traces_are_read(tmp_path):
    (tmp_path / "t.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319569,3180,8\n"
    )
    assert read_trace(tmp_path / "t.csv").arrival_s[1] == pytest.approx(0.051997, abs=1e-5)


def test_broken_lines_are_named_all_at_once(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens\n0,10,5\nsoon,10,5\n1,0,5\n2,10\n3,10,2.5\n4,10,nan\n"
    )
    with pytest.raises(SpecError) as error:
        read_trace(path)
    where = [problem.where.partition(": ")[2] for problem in error.value.problems]
    assert where == [
        "line 3: arrival_s",
        "line 4: prompt_tokens",
        "line 5: output_tokens",
        "line 6: output_tokens",
        "line 7: output_tokens",
    ]
    path.write_text("when,prompt_tokens,output_tokens\n0,10,5\n")
    with pytest.raises(SpecError, match="no column arrival_s"):
        read_trace(path)
    path.write_text("arrival_s,prompt_tokens,output_tokens\n")
    with pytest.raises(SpecError, match="holds no request"):
        read_trace(path)


@pytest.mark.parametrize(("rate", "published_ms"), [(2.0, 15.3), (4.0, 20.7), (6.0, 32.1)])
def test_fixed_point_of_an_affine_pool(rate, published_ms):
    """12 ms, 60 µs a decode, 90 µs a prompt token, 1,000 in and 200 out: mean iterations of a simulation written apart."""
    load = steady_load(POOL, scheduler("sarathi", 4096, 8192), Lengths(1000, 200), rate)
    assert 1e3 * load.tpot_s[0] == pytest.approx(published_ms, rel=0.05)


def test_chain_of_an_affine_pool():
    """20 ms + 0.2 ms a decode, 100 decodes, 20 requests/s: (a + b)λD/(1 − bλD) = 67.33 at a time, whatever the lengths."""
    for output_cv2 in (0.0, 1.0):
        load = percentiles(
            Affine(20e-3, 0.2e-3), scheduler("sarathi", 4096, 8192), Lengths(1, 101, 0.0, output_cv2), 20.0
        )
        assert load.decodes == pytest.approx(67.33, rel=0.01)


@pytest.mark.parametrize(("prompt_cv2", "output_cv2"), [(2.0, 0.0), (0.0, 2.0), (1.0, 1.0)])
def test_a_wait_for_the_only_slot_is_that_of_m_g_1(prompt_cv2, output_cv2):
    """A prompt of 0.21 s and 20 decodes of 10 ms: Pollaczek-Khinchine with the variation of both, each by its share of 0.41 s."""
    price, rules = Affine(10e-3, 0.0, 0.0, 1e-3), scheduler("sarathi", 1, 8192)
    lengths, rate = Lengths(200, 21, prompt_cv2, output_cv2), 0.7 / 0.41
    exact_s = mg1_wait_s(rate, 0.41, (0.2**2 * prompt_cv2 + 0.2**2 * output_cv2) / 0.41**2) + 0.21
    found, _ = run(price, rules, lengths, rate)
    assert found.ttft_s.mean == pytest.approx(exact_s, abs=2 * found.ttft_s.mean_error)
    assert steady_load(price, rules, lengths, rate).ttft_s[0] == pytest.approx(exact_s, rel=0.15)
    chain = percentiles(price, rules, lengths, rate)
    assert chain.ttft_s["p99"] == pytest.approx(found.ttft_s.p99, rel=0.2)


@pytest.mark.parametrize("policy", ["vllm", "sarathi", "orca"])
@pytest.mark.parametrize("slots", [1, 512])
@pytest.mark.parametrize(
    "lengths",
    [
        Lengths(500, 1),
        Lengths(1, 2),
        Lengths(8000, 5, 4.0, 4.0),
        Lengths(100, 2000),
        Lengths(1000, 100, prefix_hit=0.999),
    ],
)
def test_levels_are_finite_at_the_edges(policy, slots, lengths):
    """No output but the first token, prompts beyond the budget, one slot, next to no load and 95 % of it."""
    price, rules = Affine(12e-3, 60e-6, 1e-8, 90e-6, 1e-9), scheduler(policy, slots, 512)
    most = steady_load(price, rules, lengths, 1e9).most_per_s[0]
    for rate in (1e-3 * most, 0.95 * most):
        point, chain = steady_load(price, rules, lengths, rate), percentiles(price, rules, lengths, rate)
        found = [point.ttft_s[0], point.tpot_s[0], *chain.ttft_s.values(), *chain.tpot_s.values()]
        assert np.all(np.isfinite(found))
        assert min(found) >= 0.0
        assert chain.ttft_s["p50"] <= chain.ttft_s["p90"] <= chain.ttft_s["p99"]
