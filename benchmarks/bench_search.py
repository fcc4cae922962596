"""How fast the search is: cold processes, rates, memory, and growth with the cluster.

Every run is a process of its own with an empty home directory, a random global batch and a random sequence length, so that
nothing can be remembered from one run to the next. Prints a table; ``python benchmarks/bench_search.py [--quick]``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import numpy as np

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
from planner.pipeline.layout import Layouts
from planner.solve.candidates import Jobs
from planner.solve.expansion import Expansion
from planner.solve.pairs import Pairs
from planner.solve.space import Choice, Rows
from planner.solve.tables import BranchTables
from planner.solve.uniform import UniformSearch

JOBS = {
    "llama3.1-405b on 16,384 H100": ("llama3.1-405b", "h100-sxm:2048x8", (2048,), (8192,), ()),
    "gpt3-175b on 1,024 A100, Calculon's choices": (
        "gpt3-175b", "a100-sxm-80gb:128x8", (1536,), (2048,),
        (
            "--fix", "attention_kernel=eager", "--fix", "precision=fp16", "--fix", "cp=1", "--fix", "zero_group=full",
            "--explore", "sequence_parallel=gathered", "--explore", "pipeline=scatter_gather",
        ),
    ),
}  # fmt: skip


def cold(
    model: str, cluster: str, batch: int, seq: int, options: tuple[str, ...]
) -> tuple[float, float, dict]:
    """Wall seconds, peak bytes and the JSON of one cold ``planner train``."""
    command = [sys.executable, "-m", "planner", "train", "--model", model, "--cluster", cluster]
    command += ["--global-batch", str(batch), "--seq-len", str(seq), "--json", *options]
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=home, env={**os.environ, "HOME": home}, capture_output=True, check=True
        )
        wall_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0
    return wall_s, peak, json.loads(done.stdout)


def problem_405b() -> Problem:
    """Llama-3.1-405B on 16,384 H100."""
    return Problem(
        load_model("llama3.1-405b"), load_cluster("h100-sxm:2048x8"), TrainWorkload(2048, 8192), load_stack()
    )


def pricing_rate() -> float:
    """Candidates per second and core through bound, memory timeline and full cost model, ledgers already built."""
    search = UniformSearch(problem_405b(), 1, lambda batch: [])
    recipe = {slot: choices[0] for slot, choices in search.space.choices.items() if slot not in ("schedule",)}
    recipe["sequence_parallel"] = search.space.choices["sequence_parallel"][-1]
    prefix = {slot: choice for slot, choice in recipe.items() if slot in next(iter(search.space.prefixes()))}
    rows = valid_rows(search, prefix)
    work = expansion(search, prefix, rows.take(np.flatnonzero(rows.values["pp"] == 16)))
    schedule, chosen = next(d for d in search.layouts_of(16) if d[1].virtual_stages == 4)
    some = np.arange(int(work.starts[-1]))
    many = np.repeat(some, 4000 // len(some) + 1)
    none, alone = np.zeros(len(many)), np.zeros(len(many), dtype=np.intp)
    pairs = Pairs(schedule, Layouts([chosen]), alone, many, none, alone, work.states[:, many])
    work.plain(pairs)
    before, start = search.counts.scored + search.counts.rejected["device memory"], time.process_time()
    for _ in range(20):
        work.plain(pairs)
    priced = search.counts.scored + search.counts.rejected["device memory"] - before
    return priced / (time.process_time() - start)


def whole_rate(rows_each: int) -> tuple[int, float]:
    """Candidates, and candidates per second and core, of the 405B space with nothing excluded.

    Of every prefix ``rows_each`` random rows: their ledgers are built, and every layout, state, recompute choice and swap on
    them goes through the full cost model (exact memory timeline, the launcher's and the host's limits, and the step bound of what
    fits). Of a recompute by layers the fewest that fit are found, which counts once.
    """
    draw = np.random.default_rng()
    start = time.process_time()
    search = UniformSearch(problem_405b(), 1, lambda batch: [])
    branches, priced = search.branches, 0
    for prefix in search.space.prefixes():
        rows = valid_rows(search, prefix)
        if not len(rows):
            continue
        rows = rows.take(draw.permutation(len(rows))[:rows_each])
        work = expansion(search, prefix, rows)
        for pp in np.unique(rows.values["pp"]):
            states, at = np.nonzero(work.states & (rows.values["pp"] == pp))
            for schedule, layout in search.layouts_of(int(pp)):
                for recompute in range(len(branches.recomputes)):
                    on = np.flatnonzero(work.recomputes[recompute, at])
                    ones = np.ones(len(on), dtype=np.int64)
                    for swap in range(len(branches.swaps) if len(on) else 0):
                        work.evaluate(
                            Jobs(
                                schedule,
                                Layouts([layout]).deal(np.zeros(len(on), dtype=np.intp)),
                                np.full(len(on), recompute),
                                np.full(len(on), swap),
                                states[on],
                                at[on],
                                ones,
                            )
                        )
                        priced += len(on)
    return priced, priced / (time.process_time() - start)


def valid_rows(search: UniformSearch, prefix: Mapping[str, Choice]) -> Rows:
    """The rows on which a prefix keeps its rules and does something of its own."""
    rows, knobs = search.space.rows, search.space.knobs(prefix)
    ctx = rows.context(search.problem, knobs)
    ok = search.faults(prefix, ctx).first < 0
    for choice in prefix.values():
        if choice.technique is not None and choice.technique.active is not None:
            ok = ok & choice.technique.active(ctx)
    return rows.take(np.flatnonzero(ok))


def expansion(search: UniformSearch, prefix: Mapping[str, Choice], rows: Rows) -> Expansion:
    """All branches of a prefix on some rows, ledgers built."""
    knobs = search.space.knobs(prefix)
    ctx = rows.context(search.problem, knobs)
    tables = BranchTables(
        search.space, search.branches, search.pricer, search.kinds, prefix, ctx, search.ledger(prefix, ctx)
    )
    return Expansion(
        search.problem,
        search.branches,
        [tables],
        [rows],
        [search.branches.activity(rows, knobs)],
        search.counts,
    )


def main() -> None:
    """Runs everything and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each job, no cluster sizes")
    quick = parser.parse_args().quick
    draw = random.Random()
    # Cold jobs first: a child's peak begins with what this process holds when it starts one.
    print("| job | wall s | search s | candidates | scored | candidates/s | scored/s | peak MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (model, cluster, batches, lengths, options) in JOBS.items():
        for run in range(1 if quick else 3):
            batch = batches[0] if run == 0 else draw.choice((1, 2, 3)) * batches[0]
            seq = lengths[0] if run == 0 else draw.choice((1, 2)) * lengths[0]
            wall_s, peak, result = cold(model, cluster, batch, seq, options)
            search = result["search"]
            print(
                f"| {name}, batch {batch}, sequence {seq} | {wall_s:.2f} | {search['wall_s']:.2f} | "
                f"{search['candidates']:,} | {search['scored']:,} | {search['candidates'] / search['wall_s']:,.0f} | "
                f"{search['scored'] / search['wall_s']:,.0f} | {peak / 1e6:.0f} |"
            )
    if not quick:
        print("\n| devices | wall s | candidates |")
        print("|---:|---:|---:|")
    for nodes in () if quick else (1, 8, 64, 512, 8192):
        wall_s, _, result = cold("llama3.1-8b", f"h100-sxm:{nodes}x8", 65536, 4096, ())
        print(f"| {nodes * 8:,} | {wall_s:.2f} | {result['search']['candidates']:,} |")

    print(f"\npricing alone: {pricing_rate():,.0f} candidates/s/core")
    priced, rate = whole_rate(64 if quick else 1024)
    print(
        f"405B space, nothing excluded, ledgers included: {rate:,.0f} candidates/s/core ({priced:,} priced)"
    )


if __name__ == "__main__":
    main()
