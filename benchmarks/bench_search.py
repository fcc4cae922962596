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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
JOBS = {
    "llama3.1-405b on 16,384 H100": ("llama3.1-405b", "h100-sxm:2048x8", (2048,), (8192,), ()),
    "gpt3-175b on 1,024 A100, Calculon's choices": (
        "gpt3-175b", "a100-sxm-80gb:128x8", (1536,), (2048,),
        ("attention_kernel=eager", "precision=fp16", "cp=1", "zero_group=full"),
    ),
}  # fmt: skip


def cold(model: str, cluster: str, batch: int, seq: int, fixed: tuple[str, ...]) -> tuple[float, float, dict]:
    """Wall seconds, peak bytes and the JSON of one cold ``planner train``."""
    command = [sys.executable, "-m", "planner", "train", "--model", model, "--cluster", cluster]
    command += ["--global-batch", str(batch), "--seq-len", str(seq), "--json"]
    command += [part for choice in fixed for part in ("--fix", choice)]
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "HOME": home}, capture_output=True, check=True
        )
        wall_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0
    return wall_s, peak, json.loads(done.stdout)


def pricing_rate() -> float:
    """Candidates per second and core through bound, memory timeline and full cost model, ledgers already built."""
    from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
    from planner.solve.expansion import Expansion
    from planner.solve.tables import BranchTables
    from planner.solve.uniform import UniformSearch

    problem = Problem(
        load_model("llama3.1-405b"), load_cluster("h100-sxm:2048x8"), TrainWorkload(2048, 8192), load_stack()
    )
    search = UniformSearch(problem, 1, lambda batch: [])
    recipe = {slot: choices[0] for slot, choices in search.space.choices.items() if slot not in ("schedule",)}
    recipe["sequence_parallel"] = search.space.choices["sequence_parallel"][-1]
    knobs = search.space.knobs(recipe)
    ctx = search.space.rows.context(problem, knobs)
    rows = search.space.rows.take(
        np.flatnonzero((search.faults(recipe, ctx).first < 0) & (ctx.mesh.pp == 16))
    )
    ctx = rows.context(problem, knobs)
    prefix = {slot: choice for slot, choice in recipe.items() if slot in next(iter(search.space.prefixes()))}
    tables = BranchTables(
        search.space, search.branches, search.pricer, search.kinds, prefix, ctx, search.ledger(prefix, ctx)
    )
    work = Expansion(problem, search.branches, [tables], [rows], search.counts)
    schedule, layout = next(d for d in search.layouts_of(16) if d[1].virtual_stages == 4)
    many = np.repeat(np.arange(len(rows)), 4000 // len(rows) + 1)
    work.plain(schedule, layout, many)
    before, start = search.counts.scored + search.counts.rejected["device memory"], time.process_time()
    for _ in range(20):
        work.plain(schedule, layout, many)
    priced = search.counts.scored + search.counts.rejected["device memory"] - before
    return priced / (time.process_time() - start)


def main() -> None:
    """Runs everything and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each job, no cluster sizes")
    quick = parser.parse_args().quick
    draw = random.Random()
    print(f"pricing alone: {pricing_rate():,.0f} candidates/s/core\n")
    print("| job | wall s | search s | candidates | scored | candidates/s | scored/s | peak MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (model, cluster, batches, lengths, fixed) in JOBS.items():
        for run in range(1 if quick else 3):
            batch = batches[0] if run == 0 else draw.choice((1, 2, 3)) * batches[0]
            seq = lengths[0] if run == 0 else draw.choice((1, 2)) * lengths[0]
            wall_s, peak, result = cold(model, cluster, batch, seq, fixed)
            search = result["search"]
            print(
                f"| {name}, batch {batch}, sequence {seq} | {wall_s:.2f} | {search['wall_s']:.2f} | "
                f"{search['candidates']:,} | {search['scored']:,} | {search['candidates'] / search['wall_s']:,.0f} | "
                f"{search['scored'] / search['wall_s']:,.0f} | {peak / 1e6:.0f} |"
            )
    if quick:
        return
    print("\n| devices | wall s | candidates |")
    print("|---:|---:|---:|")
    for nodes in (1, 8, 64, 512, 8192):
        wall_s, _, result = cold("llama3.1-8b", f"h100-sxm:{nodes}x8", 65536, 4096, ())
        print(f"| {nodes * 8:,} | {wall_s:.2f} | {result['search']['candidates']:,} |")


if __name__ == "__main__":
    main()
