"""``planner simulate``: plans and pool files under traces, rates and clients; mistakes are named."""

from pathlib import Path

import numpy as np
import pytest

from planner.cli import main
from planner.cli.serve_plan import read_serving_plan
from planner.engine.pricer import Pricer
from planner.load.iteration_time import Affine
from planner.load.requests import Lengths, draw
from planner.load.results import summarize
from planner.load.scheduler import KvPool, scheduler
from planner.load.simulator import simulate
from planner.serving.candidates import iterations_of
from planner.serving.deployment import Deployment, Stage, deployment_of, run
from planner.serving.replay import problem_of
from planner.serving.space import mesh_of, row_of
from planner.technique import SERVING_SLOTS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
POOL, TRACE = EXAMPLES / "pool.toml", EXAMPLES / "trace.csv"
SERVE = (
    "--model", "llama3.1-8b", "--cluster", "h100-sxm:1x2", "--isl", "500", "--osl", "60", "--ttft-ms", "2000", "--tpot-ms", "40",
)  # fmt: skip


@pytest.fixture(scope="module")
def serving_plans(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "plans.json"
    assert main(["serve", *SERVE, "--json", "-o", str(path)]) == 0
    return path


def test_a_trace_through_a_pool(planner):
    found = planner("simulate", POOL, "--trace", TRACE, "--json").json
    assert found["simulated"]["requests"] == 120
    latency = found["simulated"]["ttft_s"]
    assert latency["p50"] <= latency["p90"] <= latency["p99"]
    assert latency["mean_error"] > 0
    assert found["predicted"] is None


def test_a_run_repeats_by_its_seed(planner):
    arguments = ("simulate", POOL, "--rate", 2, "--isl", 400, "--osl", 100, "--requests", 400, "--json")
    assert planner(*arguments).out == planner(*arguments).out
    assert planner(*arguments).out != planner(*arguments, "--seed", 1).out


def test_clients_keep_their_number_of_requests(planner):
    arguments = (
        "simulate",
        POOL,
        "--concurrency",
        8,
        "--isl",
        400,
        "--osl",
        100,
        "--requests",
        800,
        "--json",
    )
    found = planner(*arguments).json["simulated"]
    assert found["requests_per_s"] * found["e2e_s"]["mean"] == pytest.approx(8, rel=0.05)


def test_policies_differ(planner):
    arguments = ("simulate", POOL, "--rate", 2, "--isl", 2000, "--osl", 100, "--requests", 500, "--json")
    stall = {p: planner(*arguments, "--scheduler", p).json["simulated"] for p in ("orca", "sarathi")}
    assert stall["sarathi"]["iteration_s"]["p99"] < stall["orca"]["iteration_s"]["p99"]


def test_a_plan_is_simulated_at_its_own_traffic(planner, serving_plans):
    """At half the predicted rate the simulated time per token lies below the promise, on the screen and in JSON."""
    plan = planner("simulate", serving_plans, "--requests", 2000, "--json").json
    rate = plan["predicted"]["requests_per_s"]
    found = planner("simulate", serving_plans, "--rate", rate / 2, "--requests", 2000, "--json").json
    assert found["simulated"]["tpot_s"]["p50"] < 0.040
    assert found["simulated"]["requests_per_s"] == pytest.approx(rate / 2, rel=0.15)
    shown = planner("simulate", serving_plans, "--rate", rate / 2, "--requests", 2000).out
    assert "time to first token" in shown
    assert "the plan, at" in shown


@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
def test_a_plan_foretells_what_is_simulated(mode, tmp_path):
    """Arrivals of their own at the load that a plan promises: what the chains foretell is what is simulated, limits included."""
    path = tmp_path / "plans.json"
    fixed = ("--fix", "pp=1")  # stages are foretold less closely: tests/unit/test_pipelined_load.py
    limits = ("--ttft-ms", "300", "--tpot-ms", "25", "--mode", mode)
    assert main(["serve", *SERVE[:8], *limits, *fixed, "--json", "-o", str(path)]) == 0
    plan = read_serving_plan(str(path))
    deployment = deployment_of(plan)
    rate = plan.estimate.goodput_requests_per_s
    asked = draw(Lengths(500, 60), 20_000 * plan.pools[0].replicas, rate_per_s=rate, seed=5)
    found = summarize(run(deployment, asked), 0.1)
    for name, allowed in (("mean", 0.05), ("p50", 0.08), ("p90", 0.1), ("p99", 0.15)):
        error = 2.0 * getattr(found.ttft_s, f"{name}_error")
        assert plan.estimate.ttft_s[name] == pytest.approx(
            getattr(found.ttft_s, name), rel=allowed, abs=error
        )
    assert plan.estimate.tpot_s["mean"] == pytest.approx(found.tpot_s.mean, rel=0.05)
    assert found.ttft_s.mean - found.ttft_s.mean_error <= 0.3 * 1.05


def test_two_stages_in_a_row():
    """Prompts of 10 tokens take 2 s alone, the way over 0.5 s, then 1 s for the first and each of four more tokens."""
    first = Stage("prefill", 1, Affine(1.0, per_prefill_token_s=0.1), scheduler("vllm", 1, 64), KvPool())
    second = Stage("decode", 1, Affine(1.0), scheduler("sarathi", 8, 64), KvPool())
    asked = draw(Lengths(10, 6), 1, rate_per_s=1.0)
    done = run(Deployment((first, second), 0.25, lambda prompt: 0.0 * prompt + 0.5), asked)
    assert done.first_token_s[0] - asked.arrival_s[0] == pytest.approx(2.0 + 0.5 + 0.25)
    assert done.finish_s[0] - done.first_token_s[0] == pytest.approx(5.0)


def test_engines_share_requests():
    """Two engines that take turns are each one with every other request."""
    price, rules = Affine(10e-3, 1e-4, 0.0, 1e-4), scheduler("vllm", 16, 4096)
    asked = draw(Lengths(100, 30), 200, rate_per_s=8.0, seed=2)
    both = run(Deployment((Stage("aggregated", 2, price, rules, KvPool()),)), asked)
    every_other = type(asked)(asked.arrival_s[::2], asked.prompt_tokens[::2], asked.output_tokens[::2])
    alone = simulate(every_other, price, rules)
    assert both.first_token_s[::2].tolist() == alone.first_token_s.tolist()
    assert both.requests.arrival_s.tolist() == asked.arrival_s.tolist()


@pytest.mark.parametrize(
    ("arguments", "where", "expected"),
    [
        (("--rate", "0", "--isl", "9", "--osl", "9"), "--rate", "above 0"),
        (("--isl", "9", "--osl", "9"), "--rate", "--concurrency or a --trace"),
        (("--rate", "1"), "--isl", "tokens"),
        (("--rate", "1", "--concurrency", "2"), "--rate", "one of them"),
        (("--concurrency", "0", "--isl", "9", "--osl", "9"), "--concurrency", "from 1"),
        (("--rate", "1", "--isl", "9", "--osl", "0"), "--osl", "from 1"),
        (("--rate", "1", "--isl", "9", "--osl", "9", "--requests", "0"), "--requests", "from 1"),
        (("--rate", "1", "--isl", "9", "--osl", "9", "--scheduler", "fifo"), "--scheduler", "sarathi"),
    ],
)
def test_mistakes_name_their_flag(planner, arguments, where, expected):
    result = planner("simulate", POOL, *arguments, "--json")
    assert result.code == 2
    assert result.faults[0]["where"] == where
    assert expected in result.faults[0]["expected"]


def test_broken_lines_and_files_are_named(planner, tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,ten,5\n")
    result = planner("simulate", POOL, "--trace", tmp_path / "t.csv")
    assert result.code == 2
    assert "line 3: prompt_tokens: 'ten'; expected a whole number" in result.err
    (tmp_path / "p.toml").write_text("[iteration]\nbase = 1.0\n[cache]\nblocks = 0\n")
    faults = planner("simulate", tmp_path / "p.toml", "--rate", 1, "--isl", 5, "--osl", 5, "--json").faults
    assert {fault["where"].rpartition(": ")[2] for fault in faults} == {
        "iteration.base_s",
        "iteration.base",
        "cache.blocks",
    }


def test_a_request_that_never_fits_is_infeasible(planner):
    result = planner("simulate", POOL, "--rate", 1, "--isl", 90_000, "--osl", 10, "--requests", 5)
    assert result.code == 3
    assert "the longest request needs" in result.err


def test_training_plans_are_sent_back(planner, plans):
    result = planner("simulate", plans, "--rate", 1)
    assert result.code == 2
    assert "is a training plan" in result.err


def test_engines_take_as_long_as_the_plans_iterations(serving_plans):
    """The table that is simulated against the ledger priced anew: 3 % at random compositions, 8 % at the edge of a tile."""
    plan = read_serving_plan(str(serving_plans))
    (stage,) = deployment_of(plan).stages
    problem, (pool,) = problem_of(plan), plan.pools
    row = row_of(pool.mesh)
    recipe = {slot: str(pool.knobs[slot]) for slot in SERVING_SLOTS}
    iterations = iterations_of(problem, recipe, mesh_of(row), Pricer(problem.cluster, problem.stack))
    random = np.random.default_rng(0)
    n = random.integers(1, stage.rules.max_requests, 200)
    m = random.integers(0, stage.rules.token_budget, 200) * random.integers(0, 2, 200)
    context, seen = n * random.uniform(100, 900, 200), random.uniform(50, 800, 200)
    exact = iterations(n, context, m, seen)
    error = np.abs(stage.iteration(n, context, m, m * seen) / exact - 1.0)
    assert np.quantile(error, 0.9) < 0.03
    assert np.max(error) < 0.08


def test_a_load_beyond_the_pool_is_told(planner):
    base = ("simulate", POOL, "--isl", 400, "--osl", 100, "--requests", 2000)
    beyond, within = (planner(*base, "--rate", rate, "--json").json["simulated"] for rate in (1000, 2))
    assert beyond["falls_behind"]
    assert beyond["waiting_at_end"] > 1000
    assert not within["falls_behind"]
    assert "More came than was served" in planner(*base, "--rate", 1000).out
    assert "More came than was served" not in planner(*base, "--rate", 2).out
    assert "More came" not in planner(*base, "--concurrency", 2000).out


def test_a_run_that_no_memory_holds_is_refused(planner):
    found = planner("simulate", POOL, "--rate", 1, "--isl", 400, "--osl", 100, "--requests", 10**11)
    assert found.code == 2
    assert "--requests: 100000000000; expected a whole number from 1 to 10,000,000" in found.err


def test_a_static_batch_holds_whole_prompts_whatever_the_plans_budget(planner, serving_plans):
    run = planner(
        "simulate", f"{serving_plans}:1", "--scheduler", "static", "--requests", 2000, "--json"
    ).json["simulated"]
    assert run["mean_requests"] > 10  # a budget of one prompt or two would run them nearly alone
