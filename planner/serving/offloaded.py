"""Models beyond a device's memory: weights, cache and activations over device, host and disk, for the most tokens per second.

Batches of ``g`` sequences, ``k`` of them to a block, go through the layers in FlexGen's zig-zag order. For every ``(g, k)`` a
linear program places each of the three (:mod:`planner.solve.combinatorial.block_placement`). What is computed is priced like any
other iteration; attention to a cache that lies beyond the device is left to the host.

Answers come a block at a time, minutes to hours after their prompts: it is a mode for throughput, and keeps no limit of latency.

Source: Sheng et al. 2023 (FlexGen, ICML, arXiv:2303.06865), section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from planner.costs.block_schedule import BlockLinks, BlockWork, block_layer_s
from planner.costs.kv_cache import iteration_activation_bytes
from planner.engine.pricer import Pricer
from planner.serving.block_time import BlockTime
from planner.serving.candidates import iterations_of, rules_of
from planner.serving.iteration import Iterations
from planner.serving.plan import Pool, ServeEstimate
from planner.serving.space import DEGREES, ServeSpace, mesh_of
from planner.solve.combinatorial.block_placement import FILLED, THINGS, BlockPlacement, Room, best_placement
from planner.specs.cluster import Cluster
from planner.specs.serve_problem import ServeProblem

__all__ = [
    "block_time",
    "broken_rules",
    "links_of",
    "offloaded_plan",
    "offloaded_streams",
    "search_offloaded",
    "shortage",
]

_BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
_BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

# Of a link's rate, what streams reach: FlexLLMGen's constants, fitted on a Google Cloud T4 (12.89, 0.97 and 4.82 GiB/s over
# PCIe 3 x16), FMInference/FlexLLMGen experimental/cost_model.py.
_IN, _CACHE_OUT, _HIDDEN_OUT = 0.879, 0.066, 0.329


def links_of(cluster: Cluster) -> BlockLinks:
    """A machine's ways between device, host and disk, per device."""
    link, disk = float(cluster.host_link_bytes_per_s), float(cluster.nvme_bytes_per_s)
    return BlockLinks(_IN * link, _CACHE_OUT * link, _HIDDEN_OUT * link, disk, disk, disk, disk)


def search_offloaded(
    problem: ServeProblem, pricer: Pricer, only: tuple[int, int] | None = None
) -> list[BlockPlacement]:
    """The best placement of every number of sequences in a block, most tokens per second first; of one block alone if given."""
    iterations = _iterations(problem, pricer)
    room, links = _room(problem.cluster, iterations), links_of(problem.cluster)
    layers = float(sum(iterations.repeats().values()))
    found: dict[int, BlockPlacement] = {}
    for batch in _BATCHES if only is None else only[:1]:
        for batches in _BLOCKS if only is None else only[1:]:
            work, buffers = _work(problem, iterations, batch, batches, layers)
            best = best_placement(work, links, room, layers, batch, batches, buffers)
            size = batch * batches
            if best is not None and best.tokens_per_s > (found[size].tokens_per_s if size in found else 0.0):
                found[size] = best
    return sorted(found.values(), key=lambda f: -f.tokens_per_s)


def _iterations(problem: ServeProblem, pricer: Pricer) -> Iterations:
    """Those of one device, with the first choice of every slot."""
    return iterations_of(
        problem, next(ServeSpace(problem).recipes()), mesh_of(np.ones((1, len(DEGREES)))), pricer
    )


def broken_rules(problem: ServeProblem, pricer: Pricer) -> list[str]:
    """What forbids these formats on such a device."""
    ctx = _iterations(problem, pricer).ctx
    return [reason for reason, ok in rules_of(problem, "aggregated", ctx) if not np.all(ok)]


def _room(cluster: Cluster, iterations: Iterations) -> Room:
    """A device's places."""
    device_bytes = float(cluster.device.memory_bytes) - float(iterations.software.reserved_bytes)
    return Room(device_bytes, float(cluster.host_memory_bytes), float(cluster.nvme_bytes))


def shortage(problem: ServeProblem, pricer: Pricer) -> float:
    """What the weights and the cache of one request take of all that device, host and disk may be filled with."""
    iterations = _iterations(problem, pricer)
    footprint, room = iterations.footprint(), _room(problem.cluster, iterations)
    cache = footprint.cache_bytes(np.full(1, float(problem.traffic.isl + problem.traffic.osl)))
    needed = float(np.ravel(footprint.weights_bytes + cache)[0])
    return needed / (FILLED * (room.device + room.host + room.disk))


def _work(
    problem: ServeProblem, iterations: Iterations, batch: int, batches: int, layers: float
) -> tuple[BlockWork, float]:
    """A layer's share of what a block computes and holds, and bytes of activations inside a batch."""
    traffic, model = problem.traffic, problem.model
    footprint = iterations.footprint()
    g, block = np.array([float(batch)]), float(batch * batches)
    zero, context = np.zeros(1), traffic.isl + traffic.osl / 2.0
    host_s = float(iterations.software.iteration_s)
    prompts_s = iterations(zero, zero, g * traffic.computed_isl, np.full(1, traffic.prompt_context)) - host_s
    step_s, short_s = (iterations(g, g * length, zero, zero) - host_s for length in (context, 1.0))
    cache = (
        float(footprint.token_bytes[0] + sum(float(v[0]) for v in footprint.window_bytes.values())) / layers
    )
    attention_s = float(step_s[0] - short_s[0]) / layers * batches
    read_s = cache * block * context / float(problem.cluster.host_memory_bytes_per_s)
    work = BlockWork(
        float(footprint.weights_bytes[0]) / layers, cache, 2.0 * model.hidden, block, float(traffic.isl), float(traffic.osl),
        float(prompts_s[0]) / layers * batches, float(short_s[0]) / layers * batches, max(attention_s, 0.0), read_s,
    )  # fmt: skip
    widest = max((3.0 * b.mlp.ffn if b.mlp else 4.0 * model.hidden) for b in model.blocks.values())
    buffers = iteration_activation_bytes(float(batch) * traffic.isl, model.hidden, widest, batch, model.vocab)
    return work, float(np.ravel(buffers)[0])


def offloaded_plan(problem: ServeProblem, f: BlockPlacement) -> tuple[Pool, ServeEstimate]:
    """A placement on every device of the cluster, as a plan's pool and estimate."""
    cluster, osl = problem.cluster, problem.traffic.osl
    count = int(problem.fixed.get("replicas", cluster.devices))
    recipe = next(ServeSpace(problem).recipes())
    knobs: dict[str, Any] = {
        **recipe, "gpu_batch_size": f.batch, "gpu_batches": f.batches, "percent": " ".join(map(str, percentages(f.placed))),
    }  # fmt: skip
    mesh = dict.fromkeys(("tp", "pp", "dp", "ep", "etp"), 1)
    block, tokens_per_s = f.batch * f.batches, f.tokens_per_s * count
    ttft, tpot = (dict.fromkeys(("mean", "p50", "p90", "p99"), s) for s in (f.prefill_s, f.step_s))
    memory = {**f.device_bytes}
    price = problem.usd_per_hour
    estimate = ServeEstimate(
        output_tokens_per_s_per_device=f.tokens_per_s,
        output_tokens_per_s_per_user=1.0 / f.step_s,
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s={name: ttft[name] + (osl - 1) * tpot[name] for name in ttft},
        max_concurrency=block * count,
        goodput_requests_per_s=tokens_per_s / osl,
        usd_per_million_output_tokens=None if price is None else price / 3600.0 / f.tokens_per_s * 1e6,
        joules_per_output_token=float(cluster.device.power_w) / f.tokens_per_s,
        memory_bytes={"peak": sum(memory.values()), **memory},
        memory_budget_bytes=FILLED * float(cluster.device.memory_bytes),
        binding=f.binding,
    )
    return Pool("aggregated", count, mesh, knobs, block), estimate


def block_time(problem: ServeProblem, pricer: Pricer, pool: Pool) -> BlockTime:
    """Seconds of the iterations of a plan's block, whole or in part."""
    batch, batches = int(pool.knobs["gpu_batch_size"]), int(pool.knobs["gpu_batches"])
    (f,) = search_offloaded(problem, pricer, (batch, batches))
    iterations = _iterations(problem, pricer)
    layers = float(sum(iterations.repeats().values()))
    work, _ = _work(problem, iterations, batch, batches, layers)
    return BlockTime(work, links_of(problem.cluster), f.placed, layers, batch)


def offloaded_streams(problem: ServeProblem, pricer: Pricer, pool: Pool) -> list[dict[str, Any]]:
    """Streams of a block's prompts and of a step of its answers; they overlap, and the longest is what is waited for."""
    f = next(
        f
        for f in search_offloaded(
            problem, pricer, (int(pool.knobs["gpu_batch_size"]), int(pool.knobs["gpu_batches"]))
        )
    )
    iterations = _iterations(problem, pricer)
    layers = float(sum(iterations.repeats().values()))
    work, _ = _work(problem, iterations, f.batch, f.batches, layers)
    prefill, in_s, step = block_layer_s(work, links_of(problem.cluster), f.placed)

    def told(name: str, seconds: float, parts: dict[str, float]) -> dict[str, Any]:
        items = [
            {
                "what": what,
                "block": "",
                "by": "flexgen",
                "source": "arXiv:2303.06865",
                "seconds": layers * value,
            }
            for what, value in sorted(parts.items(), key=lambda part: -part[1])
            if value > 0.0
        ]
        return {
            "name": name,
            "decodes": float(f.batch * f.batches),
            "prefill_tokens": 0.0,
            "seconds": seconds,
            "items": items,
        }

    names = ("way out", "disk reads", "disk writes", "compute")
    return [
        told(
            "prompts of a block",
            f.prefill_s,
            dict(zip(("way in and disk reads", "way out and disk writes", "compute"), prefill, strict=True)),
        ),
        told("a token of a block", f.step_s, {"way in": in_s, **dict(zip(names, step, strict=True))}),
    ]


def percentages(placed: Mapping[str, float]) -> Iterator[int]:
    """FlexLLMGen's ``--percent``: weights, cache and activations on the device and on the host."""
    for what in THINGS:
        yield round(100.0 * placed[f"{what}.device"])
        yield round(100.0 * placed[f"{what}.host"])
