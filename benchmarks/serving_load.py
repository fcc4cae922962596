"""How well do the fixed point and the chain agree with the simulator on random pools, and how fast is each of them?

Settings are drawn at random: an affine iteration time from small to large models, prompts of 50 to 4,000 and outputs of
20 to 1,000 tokens with squared coefficients of variation from 0 to 4, prefix hits, three iteration-level policies with
their limits, and Poisson arrivals at 10 to 90 % of the bound. ``--stages`` draws replicas of 2, 4 or 8 pipeline stages
instead, whose batches share a queue and cannot overtake; prompts are all alike and cut to the budget. Simulated runs go on
until the error of the 99th percentile (95 % confidence) is below 5 %, or the requests are used up. Settings with a larger error
are scored apart, and what of the chain's miss is beyond the simulation's own error is told for all.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from planner.errors import Infeasible
from planner.load.chain import percentiles
from planner.load.fixed_point import steady_load
from planner.load.iteration_time import Affine
from planner.load.requests import Lengths, draw
from planner.load.results import summarize
from planner.load.scheduler import Scheduler, scheduler
from planner.load.simulator import simulate
from planner.serving.percentiles import Line, mixed_pool
from planner.specs.traffic import Traffic

SETTLING = 0.1
FIRST_REQUESTS = 40_000
WANTED_ERROR = 0.05


def random_setting(seed: int) -> tuple[Affine, Scheduler, Lengths, float]:
    """A pool, its policy, its requests, and their rate."""
    random = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    def variation() -> float:
        return 0.0 if random.random() < 0.25 else float(random.uniform(0.0, 4.0))

    price = Affine(
        between(5e-3, 30e-3),
        between(1e-5, 2e-4),
        between(1e-9, 2e-7),
        between(1e-5, 1.5e-4),
        between(1e-11, 2e-9),
    )
    prompt, output = round(between(50, 4000)), round(between(20, 1000))
    hit = 0.0 if random.random() < 0.6 else float(random.uniform(0.0, 0.8))
    lengths = Lengths(prompt, output, variation(), variation(), prefix_hit=hit)
    name = str(random.choice(["vllm", "sarathi", "orca"]))
    budget = None if name == "orca" else round(between(512, 8192))
    rules = scheduler(name, round(between(8, 512)), budget)
    most_per_s = float(steady_load(price, rules, lengths, 1e9).most_per_s[0])
    return price, rules, lengths, float(random.uniform(0.1, 0.9)) * most_per_s


def random_pipeline(seed: int) -> tuple[Line, Scheduler, Lengths, float]:
    """A replica of several stages, its policy, its requests, and their rate.

    The bound is that of slots or tokens while prompts hold up every round.
    """
    price, drawn, lengths, _ = random_setting(seed)
    random = np.random.default_rng([seed, 1])
    stages = int(random.choice([2, 4, 8]))
    rules = scheduler("sarathi", drawn.max_requests, round(float(np.exp(random.uniform(6.2, 8.3)))))
    lengths = replace(lengths, prompt_cv2=0.0)
    slots, room = float(rules.max_requests), max(rules.token_budget - rules.max_requests / stages, 64.0)
    each, part = slots / stages, min(room, float(lengths.computed_tokens))
    per_token = float(lengths.prefill_context_tokens / lengths.computed_tokens)
    held_s, full_s = (
        float(price(each, each * lengths.context_tokens, m, m * per_token)) for m in (part, room)
    )
    most_per_s = min(
        slots / (float(lengths.decodes) * held_s), stages * room / full_s / float(lengths.computed_tokens)
    )
    line = Line(price, float(stages), float(rules.token_budget))
    return line, rules, lengths, float(random.uniform(0.1, 0.9)) * most_per_s


def measured(seed: int, most_requests: int, pipeline: bool) -> dict[str, float]:
    """One setting, simulated."""
    stages = 1
    if pipeline:
        line, rules, lengths, rate = random_pipeline(seed)
        price, stages = line.table, int(line.stages)
    else:
        price, rules, lengths, rate = random_setting(seed)
    count = min(FIRST_REQUESTS, most_requests)
    while True:
        start = perf_counter()
        run = simulate(draw(lengths, count, rate_per_s=rate, seed=seed), price, rules, stages=stages)
        seconds = perf_counter() - start
        found = summarize(run, SETTLING)
        assert found.ttft_s is not None
        assert found.tpot_s is not None
        error = found.ttft_s.p99_error / found.ttft_s.p99
        if error < WANTED_ERROR or count >= most_requests:
            break
        count = min(most_requests, int(count * max(2.0, (error / WANTED_ERROR) ** 2)))
    return {
        "tpot_s": found.tpot_s.mean,
        "tpot_p99_s": found.tpot_s.p99,
        "ttft_s": found.ttft_s.mean,
        "ttft_p50_s": found.ttft_s.p50,
        "ttft_p99_s": found.ttft_s.p99,
        "error": error,
        "steps_per_s": found.request_iterations / seconds,
    }


def errors(seed: int, truth: dict[str, float]) -> dict[str, float]:
    """Relative errors of both levels at a setting."""
    price, rules, lengths, rate = random_setting(seed)
    point = steady_load(price, rules, lengths, rate)
    start = process_time()
    chain = percentiles(price, rules, lengths, rate)
    seconds = process_time() - start
    return {
        "fixed point, TPOT": point.tpot_s[0] / truth["tpot_s"] - 1.0,
        "fixed point, mean TTFT": point.ttft_s[0] / truth["ttft_s"] - 1.0,
        "chain, TPOT": chain.tpot_s["mean"] / truth["tpot_s"] - 1.0,
        "chain, p99 TPOT": chain.tpot_s["p99"] / truth["tpot_p99_s"] - 1.0,
        "chain, mean TTFT": chain.ttft_s["mean"] / truth["ttft_s"] - 1.0,
        "chain, p50 TTFT": chain.ttft_s["p50"] / truth["ttft_p50_s"] - 1.0,
        "chain, p99 TTFT": chain.ttft_s["p99"] / truth["ttft_p99_s"] - 1.0,
        "seconds": seconds,
    }


def pipeline_errors(seed: int, truth: dict[str, float]) -> dict[str, float]:
    """Relative errors of a pipeline's closed form at a setting; of 1 where it finds no steady state."""
    line, rules, lengths, rate = random_pipeline(seed)
    traffic = Traffic(
        int(lengths.prompt_tokens), int(lengths.output_tokens), prefix_hit=float(lengths.prefix_hit),
        length_scv=float(lengths.output_cv2), rate_per_s=rate,
    )  # fmt: skip
    start = process_time()
    try:
        found = mixed_pool(
            line, traffic, float(rules.max_requests), rate * truth["tpot_s"] * traffic.osl, rate
        )
    except Infeasible:
        found = None
    seconds = process_time() - start
    pairs = {
        "round, TPOT": ("tpot_s", "mean", "tpot_s"),
        "chain, mean TTFT": ("ttft_s", "mean", "ttft_s"),
        "chain, p50 TTFT": ("ttft_s", "p50", "ttft_p50_s"),
        "chain, p99 TTFT": ("ttft_s", "p99", "ttft_p99_s"),
    }
    row = {
        name: 1.0 if found is None else getattr(found, part)[which] / truth[known] - 1.0
        for name, (part, which, known) in pairs.items()
    }
    return row | {"seconds": seconds}


def rows_of(
    truths: list[dict[str, float]], level: Callable[[int, dict[str, float]], dict[str, float]]
) -> Iterator[dict[str, float]]:
    """Relative errors at every setting, with what of the chain's is more than the simulation's own error."""
    for seed, truth in enumerate(truths):
        row = level(seed, truth)
        beyond = max(abs(row["chain, p99 TTFT"]) - truth["error"], 0.0)
        yield {**row, "  beyond the simulation's": beyond}


def report(rows: list[dict[str, float]], title: str) -> None:
    """Medians, 90th percentiles and shares within the limits."""
    if not rows:
        return
    print(f"{title}: {len(rows)} settings, {1e3 * np.median([r['seconds'] for r in rows]):.0f} ms a chain")
    for name in rows[0]:
        if name == "seconds":
            continue
        size = np.abs([row[name] for row in rows])
        limit = 0.05 if "TPOT" in name else 0.15
        within = f"{np.mean(size <= limit):.0%} within {limit:.0%}"
        print(f"  {name:26s} median {np.median(size):6.1%}  p90 {np.quantile(size, 0.9):6.1%}  {within}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=int, default=500)
    parser.add_argument("--requests", type=int, default=200_000, help="of a setting, at most")
    parser.add_argument("--stages", action="store_true", help="replicas of several pipeline stages")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="settings simulated at once"
    )
    parser.add_argument(
        "--runs", type=Path, help="keep simulated runs in this JSON file, and take those in it as they are"
    )
    options = parser.parse_args()
    runs: dict[str, dict[str, float]] = {}
    if options.runs and options.runs.exists():
        runs = json.loads(options.runs.read_text())
    missing = [seed for seed in range(options.settings) if str(seed) not in runs]
    simulated = partial(measured, most_requests=options.requests, pipeline=options.stages)
    with get_context("spawn").Pool(options.jobs) as pool:
        for seed, run in zip(missing, pool.imap(simulated, missing), strict=True):
            runs[str(seed)] = run
            if options.runs:
                options.runs.write_text(json.dumps(runs, indent=1))
    truths = [runs[str(seed)] for seed in range(options.settings)]
    rows = list(rows_of(truths, pipeline_errors if options.stages else errors))
    known = [truth["error"] < WANTED_ERROR for truth in truths]
    report(rows, "all")
    report([row for row, k in zip(rows, known, strict=True) if k], "p99 TTFT simulated within 5 %")
    report([row for row, k in zip(rows, known, strict=True) if not k], "the others")
    print(f"simulator: {np.median([t['steps_per_s'] for t in truths]):.3g} request-iterations/s (median)")


if __name__ == "__main__":
    main()
