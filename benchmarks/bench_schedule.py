"""Speed of the schedule engine and of the pipeline bounds, and how far the bounds are below the engine.

Run with ``python benchmarks/bench_schedule.py``. A cold call generates and compiles the order; warm is best
of five. The last results are in ``bench_schedule.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from planner.costs.pipeline import latency_alpa_s
from planner.costs.pipeline_bounds import bound_1f1b_s, bound_flush_s, bound_interleaved_s
from planner.schedule.engine import simulate
from planner.schedule.order import Generator, make_order
from planner.techniques.training.schedule.zero_bubble import H1

# (schedule, p, m, v, candidates, target in ms for a cold call)
SIZES = [
    ("1f1b", 16, 128, 1, 1, 10.0),
    ("interleaved", 16, 16, 8, 100, 60.0),
    ("interleaved", 64, 1536, 3, 1, 300.0),
    ("interleaved", 64, 1536, 3, 100, None),
    ("1f1b", 64, 4096, 1, 100, None),
    (H1, 16, 128, 1, 100, None),
]


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def engine() -> None:
    simulate(make_order("1f1b", 2, 2), np.ones(2), np.ones(2))  # numpy's own first call
    print(f"{'schedule':12} {'p':>3} {'m':>5} {'v':>2} {'K':>4} {'cold ms':>8} {'warm ms':>8} {'target':>7}")
    rng = np.random.default_rng(0)
    for schedule, p, m, v, candidates, target in SIZES:
        forward, hop = rng.uniform(0.9, 1.1, (p * v, candidates)), rng.uniform(0.0, 0.05, candidates)

        def call(s=schedule, p=p, m=m, v=v, f=forward, hop=hop) -> object:
            return simulate(make_order(s, p, m, v), f, f, f, hop_s=hop)

        make_order.cache_clear()
        cold = milliseconds(call)
        warm = min(milliseconds(call) for _ in range(5))
        name = schedule.name if isinstance(schedule, Generator) else schedule
        row = f"{name:12} {p:3} {m:5} {v:2} {candidates:4} {cold:8.1f} {warm:8.1f}"
        print(row + ("" if target is None else f" {target:7.0f}"))


def bounds() -> None:
    rng = np.random.default_rng(0)
    n = 100_000
    forward, hop = rng.uniform(0.5, 1.0, (3, n)), rng.uniform(0.0, 0.1, n)
    lengths = np.array([1, 6, 1])
    flush = milliseconds(lambda: bound_flush_s(forward, forward, 64, hop, lengths))
    cycles = milliseconds(lambda: bound_1f1b_s(forward, forward, 64, hop, lengths))
    chunks = [forward] * 4
    interleaved = milliseconds(lambda: bound_interleaved_s(chunks, chunks, 64, hop, lengths))
    print("\nbounds of 1e5 candidates with 3 stage classes")
    print(f"flush {flush:.0f} ms, 1f1b {cycles:.0f} ms, interleaved with v = 4 {interleaved:.0f} ms")


def stages(rng: np.random.Generator, kind: str, n: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward seconds: equal but for the first and last stage, or all different."""
    if kind == "all different":
        return rng.uniform(0.5, 1.5, (n, candidates)), rng.uniform(1.0, 3.0, (n, candidates))
    forward = np.ones((n, candidates))
    forward[0] += rng.uniform(-0.3, 0.3, candidates)
    forward[-1] += rng.uniform(-0.3, 0.6, candidates)
    return forward, forward * rng.uniform(1.8, 3.0, candidates)


def tightness() -> None:
    rng = np.random.default_rng(1)
    print("\ngap below the engine, 300 orders of 64 candidates; hops up to 0.2 of a middle forward")
    for kind in ("classes", "all different"):
        gaps: dict[str, list[np.ndarray]] = {
            "1f1b": [],
            "flush": [],
            "interleaved": [],
            "alpa (no bound)": [],
        }
        for _ in range(300):
            p, v, hop = int(rng.choice([2, 4, 8, 16])), int(rng.choice([2, 3, 4])), rng.uniform(0.0, 0.2, 64)
            m = p * int(rng.integers(1, 9))
            forward, backward = stages(rng, kind, p, 64)
            step = simulate(make_order("1f1b", p, m), forward, backward, hop_s=hop).makespan_s
            gaps["1f1b"].append(1 - bound_1f1b_s(forward, backward, m, hop) / step)
            gaps["flush"].append(1 - bound_flush_s(forward, backward, m, hop) / step)
            gaps["alpa (no bound)"].append(1 - latency_alpa_s(forward + backward, m) / step)
            forward, backward = stages(rng, kind, p * v, 64)
            step = simulate(make_order("interleaved", p, m, v), forward, backward, hop_s=hop).makespan_s
            by_chunk = [x.reshape(v, p, 64) for x in (forward, backward)]
            gaps["interleaved"].append(1 - bound_interleaved_s(*by_chunk, m, hop) / step)
        for name, parts in gaps.items():
            gap = np.concatenate(parts)
            spread = f"{np.median(gap):8.2%} median {np.quantile(gap, 0.99):8.2%} p99 {gap.max():8.2%} max"
            print(
                f"{kind:14} {name:16} {spread} {gap.min():8.2%} min, exact {np.mean(np.abs(gap) < 1e-9):4.0%}"
            )


if __name__ == "__main__":
    engine()
    bounds()
    tightness()
