"""Batches of a pipeline: one queue, no overtaking, by hand and against the closed form."""

from dataclasses import replace

import numpy as np
import pytest

from planner.costs.serving import held_up_share
from planner.load.iteration_time import Affine
from planner.load.requests import Lengths, Requests, draw
from planner.load.results import summarize
from planner.load.scheduler import KvPool, scheduler
from planner.load.simulator import simulate
from planner.serving.percentiles import Line, mixed_pool, prefill_pool
from planner.specs.traffic import Traffic

RULES = scheduler("sarathi", 64, 1024)


def requests(arrival_s, prompt, output):
    return Requests(np.array(arrival_s, dtype=float), np.array(prompt), np.array(output))


def test_a_long_iteration_holds_up_those_behind_it():
    """Two stages, 1 s each without prompts; B's prompt takes 5 s at each.

    B enters behind A's second iteration at 3.8 s and leaves at 13.8 s. A has its second token at 4.8 s, finds the first stage
    taken until 8.8 s, waits for the second one until 13.8 s, and has its third token at 14.8 s; then two more, 2 s apart.
    """
    done = simulate(
        requests([0.0, 3.0], [1, 10], [5, 2]), Affine(2.0, per_prefill_token_s=0.8), RULES, stages=2
    )
    assert done.first_token_s.tolist() == pytest.approx([2.8, 13.8])
    assert done.finish_s.tolist() == pytest.approx([18.8, 15.8])


def test_a_prompt_is_taken_by_whichever_batch_is_next():
    """Four stages of 1 s: one that comes while another generates waits for the first stage alone, not for the other's batch."""
    done = simulate(requests([0.0, 4.1], [1, 1], [10, 1]), Affine(4.0), RULES, stages=4)
    assert done.first_token_s[1] == pytest.approx(5.0 + 4.0)


def test_parts_of_a_prompt_follow_each_other():
    """Three parts of 1,024 tokens through four stages of 1 s: the last one begins 2 s behind the first."""
    done = simulate(requests([0.0], [3072], [1]), Affine(4.0), RULES, stages=4)
    assert done.first_token_s[0] == pytest.approx(2.0 + 4.0)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_small_cache_serves_everybody(preemption):
    """Blocks for a few requests: all end, gave way or not, and closed loops keep as many as they say."""
    asked = draw(Lengths(100, 60, 0.0, 1.0), 300, rate_per_s=2.0, seed=3)
    rules = replace(RULES, preemption=preemption)
    pool = KvPool(70, 16, 1, 1e-3)
    done = simulate(asked, Affine(0.05, 1e-3, 0.0, 1e-4), rules, pool, stages=4)
    assert np.all(done.finish_s >= done.first_token_s)
    assert np.all(done.first_token_s > asked.arrival_s)
    assert done.preemptions.sum() > 0
    loop = simulate(asked, Affine(0.05, 1e-3, 0.0, 1e-4), rules, pool, stages=4, concurrency=6)
    held = np.sum(loop.finish_s - loop.requests.arrival_s) / loop.span_s
    assert held == pytest.approx(6.0, rel=0.05)
    assert np.all(np.diff(loop.requests.arrival_s) >= 0.0)


def test_one_stage_is_no_pipeline():
    asked = draw(Lengths(200, 40, 0.0, 1.0), 400, rate_per_s=5.0, seed=1)
    price = Affine(0.02, 1e-4, 0.0, 1e-4)
    apart = simulate(asked, price, replace(RULES, max_requests=1), stages=1)
    assert apart.finish_s.tolist() == simulate(asked, price, replace(RULES, max_requests=1)).finish_s.tolist()


@pytest.mark.parametrize(("stages", "rate"), [(2, 3.0), (4, 3.0), (8, 3.0)])
def test_the_closed_form_is_near(stages, rate):
    """70B-like: 30 ms a round, 150 ms with a prompt of 1,000 tokens. A tenth and a twentieth."""
    price, lengths = Affine(0.03, 5e-5, 0.0, 1.2e-4), Lengths(1000, 200)
    found = summarize(
        simulate(draw(lengths, 4000, rate_per_s=rate, seed=2), price, RULES, stages=stages), 0.1
    )
    line = Line(price, float(stages), 1024.0)
    said = mixed_pool(line, Traffic(1000, 200, rate_per_s=rate), 64.0, 20.0, rate)
    assert said.ttft_s["mean"] == pytest.approx(found.ttft_s.mean, rel=0.1)
    assert said.tpot_s["mean"] == pytest.approx(found.tpot_s.mean, rel=0.05)


def test_rounds_that_are_held_up():
    """1 − exp(−x) for whole prompts; of two parts in two stages every other one reaches into a second round: 1 − exp(−3x/2)."""
    assert held_up_share(0.3, 1.0, 8.0) == pytest.approx(1 - np.exp(-0.3))
    assert held_up_share(0.3, 2.0, 2.0) == pytest.approx(1 - np.exp(-0.45))


@pytest.mark.parametrize(("stages", "budget", "prompt", "load"), [(8, 2048, 1000, 0.9), (2, 8192, 4000, 0.8)])
def test_short_batches_of_prompts_wait_behind_long_ones(stages, budget, prompt, load):
    """Iterations take as many prompts as wait, and at every stage those that follow the longest one wait for it."""
    price = Affine(0.02, per_prefill_token_s=0.25 / 2048)
    rate = load * stages * budget / float(price(0, 0, budget, 0)) / prompt
    traffic = Traffic(prompt, 1)
    found = prefill_pool(Line(price, float(stages), float(budget)), traffic, rate)
    asked = draw(Lengths(float(prompt), 1.0), 40_000, rate_per_s=rate, seed=1)
    told = summarize(simulate(asked, price, scheduler("sarathi", 4096, budget), stages=stages), 0.2)
    assert found["mean"] == pytest.approx(told.ttft_s.mean, rel=0.12)
    passed_alone_s = float(price(0, 0, prompt, 0))
    assert found["mean"] > 1.2 * passed_alone_s
