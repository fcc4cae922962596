"""What a step time and a peak are made of, as far as each part may be off on its own, and where to look when it is.

A term's share of the step times its own uncertainty (``residuals.json``, fitted to published runs) is what it may contribute to
a difference; how uncertain a step is follows from all of them, ``√Σ (share · deviation)²``. Three terms are no part of the step's
breakdown: what overlap hides, what the host takes to issue kernels while the device still works, and whatever the model leaves
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import hypot

from planner.ledger import Kernel
from planner.plans.attribution import Spend

__all__ = [
    "OUTSIDE",
    "PEAK_TERMS",
    "TIME_TERMS",
    "Term",
    "peak_parts",
    "terms_spread",
    "time_parts",
    "time_shares",
]

OUTSIDE = "outside"
"""Whatever has no term: it may be off by a fraction of the whole."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part: what it is, why it may be more and why less than planned (empty: it cannot be), and what to look at."""

    name: str
    what: str
    why: str
    why_less: str
    check: str


TIME_TERMS = (
    Term(
        "matmul",
        "matrix products",
        "clocks below what the power limit usually allows, a slower kernel, small or misaligned shapes",
        "higher clocks, kernels of a newer library, products in fewer bits than the plan's",
        "SM clock and power during the step (nvidia-smi dmon); GEMM kernels' TFLOP/s in the profiler",
    ),
    Term(
        "attention",
        "attention",
        "another kernel than was planned: no fused attention, an older version, an unusual head size",
        "a newer kernel than the stack's, packed documents that attend to themselves alone",
        "names of the attention kernels in the profiler, and their TFLOP/s",
    ),
    Term(
        "memory_bound",
        "memory-bound kernels",
        "norms, activations, dropout or the loss are not fused",
        "more is fused or compiled than the stack has it",
        "number and time of elementwise kernels per layer",
    ),
    Term(
        "recompute",
        "recomputation",
        "more is recomputed than was planned",
        "less is recomputed than was planned",
        "forward kernels inside the backward pass",
    ),
    Term(
        "optimizer",
        "optimizer",
        "not fused or not sharded; gradient clipping and norms on the host",
        "fused, or sharded over more ranks than was planned",
        "kernels between the last backward and the next forward",
    ),
    Term(
        "pipeline_bubble",
        "pipeline bubble and hops",
        "stages are uneven (embedding, head, experts), or sends wait for receives",
        "more chunks per stage than were planned, or weight gradients fill the bubble",
        "idle time per stage; time of send and receive kernels",
    ),
    Term(
        "tensor_parallel",
        "tensor-parallel communication",
        "the group leaves its fast domain, or the link is slower than its profile",
        "more of it is hidden behind products, or the link is faster than its profile",
        "rank placement; bus bandwidth of the all-gathers by nccl-tests on one node",
    ),
    Term(
        "context_parallel",
        "context-parallel communication",
        "the ring crosses nodes, or its sends do not hide behind attention",
        "more of it is hidden behind attention, or the link is faster than its profile",
        "send and receive kernels beside the attention kernels",
    ),
    Term(
        "expert_parallel",
        "expert dispatch and combine",
        "uneven routing, a slower all-to-all, permutation that is not fused",
        "evener routing, a fused dispatcher, or more of it is hidden",
        "tokens per expert and rank; time of all-to-all and permute kernels",
    ),
    Term(
        "resharding",
        "activations between layers of unlike degrees",
        "the ranks of both layers are further apart than their links are fast",
        "the link is faster than its profile",
        "time of the all-to-alls and all-gathers between these layers",
    ),
    Term(
        "data_parallel",
        "gradient and weight traffic that nothing hides",
        "network contention: other jobs, a rail or a NIC that is down, GPUDirect that is off",
        "more of it is hidden, or the network is faster than its profile",
        "nccl-tests across all nodes; NCCL_DEBUG=INFO for transports and rails",
    ),
    Term(
        "offload",
        "traffic to host memory",
        "pageable memory, a shared PCIe switch, NUMA binding",
        "more of it is hidden, or the host's link is faster than its profile",
        "rate of the copies; numactl; lspci for the link's width",
    ),
    Term(
        "overlap",
        "communication that ought to be hidden",
        "collectives wait for a stream or a bucket, or take the compute kernels' multiprocessors",
        "",
        "whether collectives and compute kernels run side by side; bucket sizes; CUDA_DEVICE_MAX_CONNECTIONS",
    ),
    Term(
        "host_dispatch",
        "launches: what the host takes to issue kernels",
        "Python, logging, synchronisation or a slow CPU keep the device waiting",
        "",
        "gaps between kernels; CPU time per layer; CUDA graphs",
    ),
    Term(
        OUTSIDE,
        "what the model leaves out: stragglers, data loading, checkpoints, evaluation, other jobs",
        "one slow rank holds all others; the step waits for its input",
        "",
        "step time per rank; time of one device alone; data loader's queue",
    ),
)
PEAK_TERMS = (
    Term(
        "parameters",
        "parameters",
        "a second copy: master weights, an average of weights",
        "held in fewer bits, or sharded",
        "memory snapshot",
    ),
    Term(
        "gradients",
        "gradients",
        "kept in a wider format, or not sharded",
        "kept in a narrower format, or sharded",
        "memory snapshot: type of the gradients",
    ),
    Term(
        "optimizer",
        "optimizer states",
        "wider states, or not sharded",
        "narrower states, or sharded over more ranks than was planned",
        "bytes of the optimizer's state",
    ),
    Term(
        "activations",
        "activations",
        "less is recomputed, an operator saves more, more micro-batches are in flight",
        "more is recomputed, an operator saves less, fewer micro-batches are in flight",
        "memory snapshot at the end of the first forward passes",
    ),
    Term(
        "logits",
        "logits and loss",
        "the loss is not fused, or keeps fp32 logits",
        "the loss is fused, or takes the tokens in chunks",
        "memory snapshot at the loss",
    ),
    Term(
        "workspace",
        "workspace of one block",
        "an unfused operator's intermediate",
        "an operator is fused, or what it needs is freed before the peak",
        "memory snapshot at the peak",
    ),
    Term(
        "gathered",
        "gathered weights",
        "more layers are prefetched, or not freed",
        "fewer layers are prefetched",
        "FSDP's prefetch and reshard settings",
    ),
    Term(
        "buffers",
        "communication buffers",
        "larger or more buckets",
        "smaller or fewer buckets",
        "bucket sizes of the framework",
    ),
    Term(
        "fragmentation",
        "fragmentation",
        "sizes that vary from step to step",
        "sizes that repeat, or segments that expand",
        "reserved against allocated bytes; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ),
    Term(
        "communicators",
        "communicators",
        "more groups, more channels",
        "fewer groups, fewer channels",
        "memory before and after init; NCCL_BUFFSIZE",
    ),
    Term(
        "framework",
        "framework",
        "larger workspaces, CUDA graphs' pools",
        "smaller workspaces, no CUDA graphs",
        "memory of a process that did nothing",
    ),
    Term(
        OUTSIDE,
        "what the model leaves out",
        "other processes on the device",
        "",
        "nvidia-smi: processes on the device",
    ),
)

_JOINED = {"tied_embedding": "data_parallel", "pipeline_hops": "pipeline_bubble"}


def time_parts(
    step_time_s: float, breakdown_s: Mapping[str, float], spends: Iterable[Spend], dispatch_s: float
) -> dict[str, float]:
    """Seconds at stake by the name of a term, zeros left out.

    Args:
        step_time_s: the whole step: what is at stake outside the model.
        breakdown_s: of the step, by category.
        spends: of the step on the busiest device; ``overlap`` is what is hidden of them.
        dispatch_s: host seconds per kernel.
    """
    names = {term.name for term in TIME_TERMS}
    parts = dict.fromkeys((term.name for term in TIME_TERMS), 0.0)
    for category, seconds in breakdown_s.items():
        name = _JOINED.get(category, category)
        if name != "host_dispatch":
            parts[name if name in names else OUTSIDE] += max(seconds, 0.0)
    for spent in spends:
        item = spent.share.item
        parts["overlap"] += spent.alone_s - spent.seconds
        if isinstance(item, Kernel) and spent.share.price_s > 0.0:
            parts["host_dispatch"] += spent.times * item.launches * dispatch_s
    parts[OUTSIDE] = step_time_s
    return {name: seconds for name, seconds in parts.items() if seconds > 0.0}


def time_shares(
    step_time_s: float, breakdown_s: Mapping[str, float], spends: Iterable[Spend], dispatch_s: float
) -> dict[str, float]:
    """The same relative to the step, without what is at stake outside the model: that is the same of all."""
    parts = time_parts(step_time_s, breakdown_s, spends, dispatch_s)
    return {name: seconds / step_time_s for name, seconds in parts.items() if name != OUTSIDE}


def terms_spread(shares: Mapping[str, float], deviations: Mapping[str, float]) -> float:
    """Standard deviation of the logarithm of a whole whose terms err independently.

    Args:
        shares: of the whole, by term; they need not add up to one.
        deviations: of each term's logarithm.

    >>> terms_spread({"matmul": 0.6, "pipeline_bubble": 0.4}, {"matmul": 0.05, "pipeline_bubble": 0.1})
    0.05
    """
    return hypot(*(share * deviations[name] for name, share in shares.items()))


def peak_parts(memory_bytes: Mapping[str, float], without: Iterable[str] = ()) -> dict[str, float]:
    """Bytes at stake by the name of a term; pools that were not counted are left out.

    Args:
        memory_bytes: ``peak`` and its pools.
        without: pools outside what was counted.
    """
    names = {term.name for term in PEAK_TERMS}
    kept = {name: held for name, held in memory_bytes.items() if name != "peak" and name not in set(without)}
    parts = {name: held for name, held in kept.items() if name in names and held > 0.0}
    return parts | {OUTSIDE: sum(kept.values())}
