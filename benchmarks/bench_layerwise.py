"""The layer-wise search beside the published formulations that it replaces, on the same costs in the same process.

Prints tables; ``python benchmarks/bench_layerwise.py [--part counts|stages|search|value] [--time-limit 20]``. Times are CPU
seconds of one thread, warm, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
from planner.plans.plan import Plan
from planner.solve.layerwise.alpa import descended, enumerated
from planner.solve.layerwise.counts import CountProblem, Group, bound, solve
from planner.solve.layerwise.devices import DeviceCosts
from planner.solve.layerwise.galvatron import galvatron
from planner.solve.layerwise.search import search_layerwise
from planner.solve.layerwise.settle import Settler
from planner.solve.layerwise.solvers import automatic, by_highs
from planner.solve.layerwise.space import LayerwiseSpace
from planner.solve.train import search
from planner.solve.uniform import UniformSearch

MB = 2.0**20
_TOLERANCE = 1e-4  # of a device's time, as in the search
# Ten public models on clusters where memory, layers or stages do not come out even.
PAIRS = (
    ("llama3-70b", "h100-sxm:4x8", 64, 8192),
    ("llama3-70b", "a100-sxm-80gb:4x8", 128, 4096),
    ("llama2-13b", "rtx-4090:2x8", 64, 4096),
    ("llama3-8b", "a100-sxm-80gb:1x8", 64, 32768),
    ("qwen2.5-72b", "h100-sxm:8x8", 128, 32768),
    ("gpt3-175b", "a100-sxm-80gb:8x8", 192, 2048),
    ("mixtral-8x7b", "a100-sxm-80gb:2x8", 128, 4096),
    ("gemma2-27b", "h100-sxm:1x8", 64, 8192),
    ("nemotron4-340b", "h100-sxm:16x8", 256, 4096),
    ("llama3.1-405b", "h100-sxm:128x8", 512, 8192),
)


def cpu_s(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """CPU seconds of a call (the median of some), and its result."""
    times, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        times.append(time.process_time() - start)
    return float(np.median(times)), result


def counts() -> None:
    """80 layers, 24 strategies, 80 GB, one switch cost between classes: Galvatron's chain at 1 MB against counts."""
    print(
        "counts: layers strategies GB | chain at 1 MB s, counts ms, HiGHS ms | ratio | chain's answer, ours"
    )
    draw = np.random.default_rng(1)
    for layers, strategies, gb in ((32, 12, 38), (32, 24, 38), (80, 24, 80)):
        held = draw.uniform(200.0, 2000.0, strategies) * MB
        cost = draw.uniform(1.0, 3.0, strategies) + 400.0 * MB / held
        classes = draw.integers(0, 4, strategies)
        switch = 0.5 * (classes[:, None] != classes[None, :])
        budget = gb * 1000.0 * MB
        group = Group(layers, cost[None], held[None], tuple(classes.tolist()))
        problem = CountProblem((group,), np.array([budget]), np.zeros(1), 0.5)
        by_highs(problem)
        solve(problem)
        ours_s, ours = cpu_s(lambda problem=problem: solve(problem), 9)
        highs_s, _ = cpu_s(lambda problem=problem: by_highs(problem), 3)
        chain_s, chain = cpu_s(
            lambda c=cost, h=held, w=switch, n=layers, b=budget: galvatron(c, h, w, n, b, MB)
        )
        assert ours is not None
        assert chain is not None
        assert ours[0] <= chain[0] + 1e-9
        print(
            f"  {layers} {strategies} {gb} | {chain_s:.2f}, {1e3 * ours_s:.2f}, {1e3 * highs_s:.1f} | {chain_s / ours_s:,.0f}x | "
            f"{chain[0]:.9f}, {ours[0]:.9f}"
        )
    cost, held = np.array([1.0, 2.0]), np.array([999.5, 500.0]) * MB
    group = Group(80, cost[None], held[None])
    problem = CountProblem((group,), np.array([80 * 999.5 * MB]), np.zeros(1))
    seconds, chain = galvatron(cost, held, np.zeros((2, 2)), 80, 80 * 999.5 * MB, MB) or (np.inf, [])
    print("  where rounding loses: 80 layers of 999.5 MB (1 s) or 500 MB (2 s) in 79,960 MB:")
    print(
        f"    chain {seconds:g} s with {chain.count(0)} and {chain.count(1)} layers, counts {solve(problem)}"
    )
    large = Group(8, cost[None], held[None])
    single = CountProblem((large,), np.array([10.0]), np.zeros(1))
    solve_s, _ = cpu_s(lambda: [solve(single) for _ in range(100)])
    bound_s, _ = cpu_s(lambda: [bound(single) for _ in range(100)])
    print(f"  one stage, two strategies: {1e4 * solve_s:.0f} µs to solve, {1e4 * bound_s:.0f} µs to bound")


def stages() -> None:
    """Alpa's stages × sub-meshes: its enumeration of limits, with its own recurrence, against descending limits."""
    print("stages: layers devices | enumerated s (limits), descended s (limits) | ratio | objectives")
    draw = np.random.default_rng(1)
    for layers, devices, reference in ((8, 64, True), (16, 64, True), (32, 128, False)):
        meshes = [1, 2, 4, *range(8, devices + 1, 8)]
        sums = np.concatenate([[0.0], np.cumsum(draw.uniform(0.95, 1.05, layers))])
        cost = np.full((layers, layers, len(meshes)), np.inf)
        for i in range(layers):
            for j in range(i, layers):
                noise = 1.0 + 0.02 * draw.random(len(meshes))
                cost[i, j] = (sums[j + 1] - sums[i]) / np.array(meshes) ** 0.95 * noise
        ours_s, ours = cpu_s(lambda c=cost, m=meshes, d=devices: descended(c, m, d, 64))
        if not reference:
            print(f"  {layers} {devices} | -, {ours_s:.2f} ({ours.limits}) | - | {ours.seconds:.6f}")
            continue
        theirs_s, theirs = cpu_s(lambda c=cost, m=meshes, d=devices: enumerated(c, m, d, 64))
        assert abs(ours.seconds - theirs.seconds) < 1e-9
        print(
            f"  {layers} {devices} | {theirs_s:.1f} ({theirs.limits}), {ours_s:.3f} ({ours.limits}) | "
            f"{theirs_s / ours_s:,.0f}x | {theirs.seconds:.6f}, {ours.seconds:.6f}"
        )


def job(model: str, cluster: str, batch: int, seq: int, forbidden: tuple[str, ...] = ()) -> Problem:
    workload = TrainWorkload(batch, seq)
    return Problem(
        load_model(model),
        load_cluster(cluster),
        workload,
        load_stack(),
        forbidden=forbidden,
        max_oom_risk=1.0,
    )


def one_device() -> None:
    """Llama-3.1-405B on 1,024 H100, 64 to 72 strategies: the strategies of a device under one limit on its transient, warm."""
    problem = replace(job(*PAIRS[-1], ("*_offload",)), explore=("recompute=*", "zero_group=*"))
    uniform = UniformSearch(problem, 1, lambda batch: [])
    below_s = search(problem, 1).best.estimate.step_time_s
    space = LayerwiseSpace(uniform, below_s, True)
    solved: list[CountProblem] = []

    def recorded(one: CountProblem) -> Any:
        solved.append(one)
        return automatic(one, _TOLERANCE)

    for deal in [deal for deal in space.deals(below_s) if deal.layout is not None][:4]:
        mesh = space.mesh(deal)
        costs = DeviceCosts(problem, mesh, deal.order, deal.layout.virtual_stages, recorded, _TOLERANCE)
        list(Settler(deal, mesh, costs, space.order, space.kinds, uniform.branches).candidates(np.inf))
    times = [cpu_s(lambda one=one: automatic(one, _TOLERANCE), 3)[0] for one in solved]
    bounds = [cpu_s(lambda one=one: bound(one), 3)[0] for one in solved]
    print(
        f"inner solve: {len(times)} problems | bound {1e3 * np.median(bounds):.2f} ms, bound and counts "
        f"{1e3 * np.median(times):.2f} ms (median), {1e3 * np.quantile(times, 0.9):.2f} ms (nine in ten)"
    )


def one_search() -> None:
    """Llama-3.1-405B on 1,024 H100: the layer-wise part alone, by what it is given."""
    one_device()
    print("search: llama3.1-405b on 1,024 H100 | limit s | uniform CPU s, all CPU s | gap")
    problem = job(*PAIRS[-1])
    uniform_s, _ = cpu_s(lambda: search(problem, 1))
    for limit in (0.5, 2.0, 10.0):
        all_s, found = cpu_s(lambda limit=limit: search_layerwise(problem, 1, time_limit_s=limit))
        print(f"  {limit} | {uniform_s:.2f}, {all_s:.2f} | {100 * found.best.optimality.gap:.2f} %")


def gained(uniform: Plan, layerwise: Plan) -> str:
    """What the faster plan does otherwise."""
    if layerwise.layerwise is None:
        return "layers alike are best, or as good as found"
    choices = layerwise.layerwise["strategies"]
    slots = [slot for slot in choices[0] if len({str(c[slot]) for c in choices}) > 1]
    mesh = {n: (uniform.mesh[n], v) for n, v in layerwise.mesh.items() if uniform.mesh[n] != v}
    mesh |= {
        n: (uniform.knobs[n], layerwise.knobs[n])
        for n in ("micro_batch_size", "virtual_stages")
        if uniform.knobs[n] != layerwise.knobs[n]
    }
    moved = ", ".join(f"{n} {a} to {b}" for n, (a, b) in mesh.items())
    sizes = sorted(set(layerwise.stages))
    parts = [f"layers differ in {', '.join(slots)}" if slots else "", f"mesh: {moved}" if moved else ""]
    parts.append(f"stages of {sizes[0]} to {sizes[-1]} layers" if len(sizes) > 1 else "")
    return "; ".join(filter(None, parts))


def value(limit_s: float, forbidden: tuple[str, ...]) -> None:
    """Ten public model × cluster pairs: the best uniform plan against the best layer-wise one."""
    print(f"value, {'without offload' if forbidden else 'with offload'}:")
    print("| model | cluster | batch × tokens | uniform s | layer-wise s | gain | gap left | what differs |")
    for model, cluster, batch, seq in PAIRS:
        problem = job(model, cluster, batch, seq, forbidden)
        best = search_layerwise(problem, 2, time_limit_s=limit_s).best
        alike = best if best.layerwise is None else search(problem, 1).best
        gain = 100.0 * (alike.estimate.step_time_s / best.estimate.step_time_s - 1.0)
        print(
            f"| {model} | {cluster} | {batch} × {seq:,} | {alike.estimate.step_time_s:.3f} | {best.estimate.step_time_s:.3f} | "
            f"{gain:.2f} % | {100 * best.optimality.gap:.1f} % | {gained(alike, best)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("counts", "stages", "search", "value"))
    parser.add_argument("--time-limit", type=float, default=20.0)
    given = parser.parse_args()
    parts: dict[str, Callable[[], object]] = {
        "counts": counts,
        "stages": stages,
        "search": one_search,
        "value": lambda: [value(given.time_limit, forbidden) for forbidden in (("*_offload",), ())],
    }
    for name, part in parts.items():
        if given.part in (None, name):
            part()


if __name__ == "__main__":
    main()
