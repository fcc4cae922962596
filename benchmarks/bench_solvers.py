"""Speed of the solvers of ``planner solve``, with and without what makes them fast, and the gaps that they leave.

Seconds are of the processor, on one core: the machine may be shared. Deadlines are of the clock. Run with ``python
benchmarks/bench_solvers.py``; it takes a few minutes, most of them in integer programs without elimination. The last
results are in ``bench_solvers.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from planner import TrainWorkload, load_cluster, load_model, load_stack
from planner.errors import PlannerError
from planner.solve.combinatorial.choices import minimise
from planner.solve.combinatorial.experts import align, balance, in_order, moved
from planner.solve.combinatorial.ranks import RankProblem, map_ranks, pipeline_phases
from planner.solve.combinatorial.ranks import in_order as ranks_in_order
from planner.solve.combinatorial.recompute import SOLVERS, ComputeGraph, cheapest_schedule, keep_all
from planner.solve.combinatorial.sequences import assign_sequences, longest_first
from planner.solve.combinatorial.tiering import Kernel, Tensor, Tier, TieringProblem, place, swap_all
from planner.solve.graph.operators import model_graph
from planner.solve.graph.recompute import layer_graph
from planner.solve.graph.sharding import ShardingProblem
from planner.solve.sequence_costs import sequence_problem

LIMIT_S = 60.0
GIB = 2.0**30


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    try:
        found = call()
    except PlannerError as error:
        found = error
    return found, time.process_time() - start


def proof(certificate: Any) -> str:
    return "exact" if certificate.status == "exact" else f"gap {100 * certificate.gap:.2g} %"


def shardings() -> None:
    print("shardings on a (4, 8) mesh of 32 H100, 32 sequences of 4096 tokens: seconds to price and to solve")
    print(
        f"{'model':16} {'layers':>6} {'GiB':>5} {'price':>6} {'eliminated':>26} {'integer program alone':>26}"
    )
    cluster, stack = load_cluster("h100-sxm:4x8"), load_stack()
    cases = (("mixtral-8x7b", 4, None, True), ("mixtral-8x7b", 4, 12.0, True), ("qwen3-30b-a3b", 4, 10.0, True),
             ("llama3.1-405b", 4, 20.0, True), ("deepseek-v3", 6, 40.0, False), ("mixtral-8x7b", 32, 78.0, False))  # fmt: skip
    for model, layers, gib, alone in cases:
        graph = model_graph(load_model(model), cluster, stack, TrainWorkload(32, 4096), layers=layers)
        budget = np.inf if gib is None else gib * GIB
        problem, price_s = timed(
            lambda g=graph, b=budget: ShardingProblem.priced(g, cluster, stack, (4, 8), budget_bytes=b)
        )
        row = f"{model:16} {layers:6} {'-' if gib is None else f'{gib:.0f}':>5} {price_s:6.2f}"
        for elimination in (True, False) if alone else (True,):
            found, cpu_s = timed(
                lambda p=problem, e=elimination: minimise(p.choices, elimination=e, time_limit_s=LIMIT_S)
            )
            told = (
                "nothing in time"
                if isinstance(found, PlannerError)
                else f"{1e3 * found.time_s:.2f} ms {proof(found.certificate)}"
            )
            row += f" {told + f' {cpu_s:.2f} s':>26}"
        print(row)


def chain(layers: int) -> ComputeGraph:
    """Layers of 1 s whose results take 1; a backward of 2 s reads its gradient, and its layer's input and output."""
    reads: list[tuple[int, ...]] = [(i - 1,) if i else () for i in range(layers)]
    for i in reversed(range(layers)):
        inputs = {i} | ({i - 1} if i else set()) | ({len(reads) - 1} if i < layers - 1 else set())
        reads.append(tuple(sorted(inputs)))
    names = [f"f{i}" for i in range(layers)] + [f"b{i}" for i in reversed(range(layers))]
    return ComputeGraph(names, [1.0] * layers + [2.0] * layers, [1.0] * 2 * layers, reads, boundary=layers)


def schedules() -> None:
    print("\nrecomputation within a share of the memory that computes nothing twice")
    print(f"{'graph':22} {'nodes':>5} {'memory':>6} {'more time':>9} {'search':>16} {'integer program':>20}")
    cluster, stack = load_cluster("h100-sxm:1x8"), load_stack()
    graphs: dict[str, ComputeGraph] = {}
    for model in ("gpt3-175b", "mixtral-8x7b", "deepseek-v3"):
        graph = model_graph(load_model(model), cluster, stack, TrainWorkload(1, 4096), layers=1)
        graphs[f"{model} layer"] = layer_graph(graph, 0, cluster, stack)
    graphs["chain of 16"] = chain(16)
    for name, graph in graphs.items():
        for share in (0.8, 0.6) if name != "chain of 16" else (0.7, 0.5, 0.3):
            row, more = "", "-"
            for solver in SOLVERS:
                found, cpu_s = timed(
                    lambda g=graph, f=share, s=solver: cheapest_schedule(
                        g, budget_bytes=f * keep_all(g).peak_bytes, solver=s, time_limit_s=LIMIT_S
                    )
                )
                told = "does not fit" if isinstance(found, PlannerError) else proof(found.certificate)
                if not isinstance(found, PlannerError) and solver == "search":
                    more = f"{100 * found.recompute_s / graph.once_s:.1f} %"
                row += f" {told + f' {cpu_s:.2f} s':>{16 if solver == 'search' else 20}}"
            print(f"{name:22} {len(graph):5} {100 * share:4.0f} % {more:>9}{row}")


def tiers() -> None:
    print(
        "\ntiers: a step of 40 layers (weights, kept tensors, states) over 40 GB, 200 GB at 50 GB/s and 2 TB at 6 GB/s"
    )
    n = 40
    tensors = [Tensor(f"weights {i}", 1e9, True, True) for i in range(n)] + [
        Tensor(f"kept {i}", 5e8) for i in range(n)
    ]
    tensors += [Tensor(f"states {i}", 6e9, True) for i in range(n)]
    kernels = [Kernel(f"forward {i}", 0.02, (i, n + i)) for i in range(n)]
    kernels += [Kernel(f"backward {i}", 0.04, (i, n + i)) for i in reversed(range(n))]
    kernels += [Kernel(f"update {i}", 0.002, (i, 2 * n + i)) for i in range(n)]
    levels = (Tier("hbm", 4e10), Tier("dram", 2e11, 5e10, 5e10), Tier("nvme", 2e12, 6e9, 3e9))
    for moves in ("serial", "overlapped"):
        problem = TieringProblem(tuple(kernels), tuple(tensors), levels, moves)
        found, cpu_s = timed(lambda p=problem: place(p, time_limit_s=30.0))
        swapped = swap_all(problem).time_s
        print(
            f"{moves:10} {found.time_s:.3f} s ({swapped:.3f} s with everything swapped) {proof(found.certificate)} {cpu_s:.1f} s"
        )


def sequences() -> None:
    print("\nsequence groups: Llama-3 8B on 64 A100, Ulysses; seconds of the slowest group")
    for histogram, limit_s in (
        ({1024: 64, 32768: 4}, 20.0),
        ({4096: 128, 16384: 24, 65536: 4, 131072: 1}, 20.0),
    ):
        problem = sequence_problem(
            load_model("llama3-8b"), load_cluster("a100-sxm-80gb:8x8"), load_stack(), TrainWorkload(1, 1024), histogram,
            [1, 2, 4, 8, 16, 32, 64], {"context": "a2a"},
        )  # fmt: skip
        found, cpu_s = timed(lambda p=problem, s=limit_s: assign_sequences(p, time_limit_s=s))
        dealt = [longest_first(problem, degree) for degree in problem.degrees]
        best = min(groups.time_s for groups in dealt if groups is not None)
        print(
            f"{histogram}: {found.time_s:.3f}, best of equal groups {best:.3f}; {proof(found.certificate)} {cpu_s:.1f} s"
        )


def placements() -> None:
    rng = np.random.default_rng(0)
    print("\nexperts")
    for experts, devices in ((8, 4), (64, 8), (256, 32)):
        load = rng.dirichlet(np.full(experts, 0.5)) * 1e6
        found, cpu_s = timed(lambda x=load, d=devices: balance(x, d, time_limit_s=20.0))
        busiest = f"busiest {max(found.loads) * devices / load.sum():.3f} of the mean"
        print(f"load of {experts} on {devices}: {busiest}, {proof(found.certificate)} {cpu_s:.1f} s")
    for layers, experts, devices in ((32, 8, 2), (32, 8, 4), (24, 64, 8)):
        tables = [rng.dirichlet(np.full(experts, 0.3), experts) for _ in range(layers - 1)]
        found, cpu_s = timed(lambda t=tables, d=devices: align(t, d, time_limit_s=20.0))
        before = moved(tables, in_order(layers, experts, devices)) / found.total
        move = f"{100 * found.moved / found.total:.1f} % move ({100 * before:.1f} % in order)"
        print(
            f"affinity of {layers} layers of {experts} on {devices}: {move}, {proof(found.certificate)} {cpu_s:.1f} s"
        )
    print("\nranks: stages × replicas on nodes at 5 to 25 GB/s")
    for stages, replicas in ((4, 2), (5, 2), (8, 2), (8, 4)):
        nodes = stages * replicas
        rates = rng.uniform(5e9, 25e9, (nodes, nodes))
        problem = RankProblem((rates + rates.T) / 2, pipeline_phases(stages, replicas, 1e8, 4e9, 32), 5e-6)
        found, cpu_s = timed(lambda p=problem: map_ranks(p))
        plain = problem.seconds(ranks_in_order(problem))
        print(
            f"{stages} × {replicas}: {found.time_s:.3f} s ({plain:.3f} s in order), {proof(found.certificate)} {cpu_s:.1f} s"
        )


if __name__ == "__main__":
    shardings()
    schedules()
    tiers()
    sequences()
    placements()
