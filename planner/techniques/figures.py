"""What published figures are computed with: a recipe run by hand around one pass, and sums over the ledger it leaves.

Everything heavy is imported when a figure is computed, so that finding the techniques stays cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.ledger import AttentionCore, Collective, Item, Ledger, Matmul, Phase, Resident, Transfer

if TYPE_CHECKING:
    from planner.schedule.engine import Timeline
    from planner.schedule.order import Generator, Op
    from planner.specs.model import Model
    from planner.technique import Context, Figure

__all__ = [
    "Pass",
    "between_replicas",
    "bubble_s",
    "flop",
    "graham_figure",
    "graham_jobs",
    "held_bytes",
    "in_flight",
    "in_flight_to_backward",
    "makespan_s",
    "page_faults",
    "parameters",
    "recipe",
    "run",
    "saved",
    "saved_bytes",
    "sent_bytes",
    "sent_elements",
    "span_bubble_s",
    "timeline",
    "total_bytes",
    "transferred_bytes",
    "zero_states_gb",
]

Pass = Callable[[Ledger, "Context"], Ledger]
_DEGREES = ("tp", "cp", "dp", "pp", "ep", "etp")
_PLAIN = {
    "precision": "bf16", "attention_kernel": "eager", "loss_kernel": "eager", "tensor": "1d", "context": "p2p",
    "expert": "folded", "pipeline": "stages", "optimizer": "adamw",
}  # fmt: skip
_ENDS = ("embedding", "head", "boundary")


def run(
    slot: str,
    subject: Pass,
    *,
    model: str | Model,
    seq: int = 2048,
    micro_batch_size: int = 1,
    cluster: str = "a100-sxm-80gb:1x8",
    **choices: Any,
) -> tuple[Ledger, Context]:
    """The ledger of a plain recipe with ``subject`` as the pass of ``slot``, and what the passes saw.

    ``choices`` are degrees (1 unless given) and knobs (off, or the plainest choice, unless given).
    """
    from planner.mesh import Mesh
    from planner.operators.baseline import baseline
    from planner.specs.hardware import load_cluster
    from planner.specs.models import load_model
    from planner.specs.stack import load_stack
    from planner.specs.workload import TrainWorkload
    from planner.technique import SLOTS, Context, discover, off

    spec = load_model(model) if isinstance(model, str) else model
    degrees: dict[str, Any] = {name: np.array([float(choices.pop(name, 1))]) for name in _DEGREES}
    knobs = {name: off(name) for name in SLOTS} | _PLAIN | choices
    size = np.array([float(micro_batch_size)])
    workload = TrainWorkload(global_batch_size=int(micro_batch_size * degrees["dp"][0]), seq_len=seq)
    ctx = Context(spec, load_cluster(cluster), workload, load_stack(), Mesh(**degrees), size, knobs)
    ledger = baseline(spec, batch=size, seq=float(seq))
    for name in SLOTS:
        chosen = (t for t in discover("training").values() if t.slot == name and knobs[name] in t.choices)
        passes = (subject,) if name == slot else tuple(t.apply for t in chosen)
        for apply in passes:
            ledger = apply(ledger, ctx)
    return ledger, ctx


def recipe(**choices: Any) -> tuple[Ledger, Context]:
    """:func:`run` with every choice as it is, the schedule's pass left out."""
    return run("schedule", lambda ledger, ctx: ledger, **choices)


# -- memory ------------------------------------------------------------------------------------------------------------


def saved(ledger: Ledger) -> list[Resident]:
    """Tensors that one layer keeps on the device from forward to backward, per micro-batch."""
    return [
        item
        for item in ledger.of(Resident, lifetime="micro_batch", tier="device")
        if "saved" in item.tags and item.block not in _ENDS
    ]


def saved_bytes(ledger: Ledger) -> float:
    """Bytes of :func:`saved`, of a model with one kind of layer."""
    return total_bytes(ledger, saved(ledger))


def held_bytes(ledger: Ledger, *pools: str, tier: str = "device") -> float:
    """Bytes of model states held throughout, one layer of each kind, embedding and head."""
    pools = pools or ("parameters", "gradients", "optimizer")
    items = ledger.of(Resident, lifetime="always", tier=tier)
    return total_bytes(ledger, [item for item in items if item.pool in pools])


def total_bytes(ledger: Ledger, items: Iterable[Resident]) -> float:
    """Bytes of some items, all micro-batches and layers counted once."""
    return sum(_value(ledger, item.size) * item.bytes_per_element for item in items)


def parameters(ledger: Ledger) -> float:
    """Parameters of one layer of each kind, embedding and head, whatever is sharded over data-parallel ranks."""
    sizes = [item.size for item in ledger.of(Resident, pool="gradients", lifetime="always")]
    return sum(_value(ledger, re.sub(r"/zero_\w+", "", size)) for size in sizes)


def zero_states_gb(stage: str, subject: Pass) -> float:
    """Model states of 7.5e9 parameters on 64 data-parallel ranks, in ZeRO's convention: 2 + 2 + 12 bytes."""
    ledger, _ = run(
        "zero_stage",
        subject,
        model="gpt2-xl",
        precision="fp16",
        gradient_dtype="fp16",
        dp=64,
        zero_stage=stage,
    )
    return 7.5 * held_bytes(ledger) / parameters(ledger)


def _value(ledger: Ledger, size: str) -> float:
    return float(np.ravel(ledger.axes[size])[0]) if size else 0.0


# -- work and traffic ----------------------------------------------------------------------------------------------------


def flop(ledger: Ledger, *phases: Phase, where: Callable[[Item], bool] = lambda item: True) -> float:
    """FLOP of the products of one layer of each kind (embedding and head left out)."""
    total = 0.0
    for item in ledger.items:
        if item.phase not in phases or item.block in _ENDS or not where(item):
            continue
        if isinstance(item, Matmul):
            total += 2.0 * _product(ledger, item.m, item.n, item.k, item.groups)
        elif isinstance(item, AttentionCore):
            widths = _value(ledger, item.qk_dim) + _value(ledger, item.v_dim)
            scores = _product(ledger, item.batch, item.heads, item.q, item.kv, item.visible)
            total += 2.0 * scores * widths * item.passes
    return total


def _product(ledger: Ledger, *sizes: str) -> float:
    return float(np.prod([_value(ledger, size) for size in sizes]))


def sent_elements(ledger: Ledger, where: Callable[[Collective], bool]) -> float:
    """Elements that one rank sends in the selected collectives."""
    return sum(_sent(ledger, item) for item in ledger.of(Collective) if where(item))


def sent_bytes(ledger: Ledger, where: Callable[[Collective], bool]) -> float:
    """Bytes that one rank sends in the selected collectives."""
    from planner.costs.precision import dtype_bytes

    return sum(dtype_bytes(item.dtype) * _sent(ledger, item) for item in ledger.of(Collective) if where(item))


def between_replicas(item: Item) -> bool:
    """Whether an item is traffic of data parallelism."""
    return "data_parallel" in item.tags


def _sent(ledger: Ledger, item: Collective) -> float:
    group = float(np.ravel(item.group.size)[0])
    passes = {
        "all_reduce": 2.0 * (group - 1) / group,
        **dict.fromkeys(("point_to_point", "broadcast"), float(group > 1)),
    }
    return _value(ledger, item.size) * passes.get(item.kind, (group - 1) / group)


def transferred_bytes(ledger: Ledger, tier: str = "host_link") -> float:
    """Bytes over a host link."""
    items = ledger.of(Transfer, tier=tier)
    return sum(_value(ledger, item.size) * item.bytes_per_element for item in items)


# -- solvers --------------------------------------------------------------------------------------------------------------


def graham_jobs(machines: int) -> tuple[int, ...]:
    """Jobs with which longest-first takes 4m − 1 on m machines, and the best dealing 3m: its bound 4/3 − 1/(3m) is reached.

    >>> graham_jobs(3)
    (5, 5, 4, 4, 3, 3, 3)
    """
    pairs = [length for length in range(2 * machines - 1, machines, -1) for _ in range(2)]
    return (*pairs, machines, machines, machines)


def graham_figure(what: str, machines: int, compute: Callable[[Any], float]) -> Figure:
    """The optimum of :func:`graham_jobs` as a figure; ``compute`` has the subject deal them."""
    from planner.technique import Figure

    jobs = ", ".join(map(str, graham_jobs(machines)))
    source = "github.com/coin-or/prtpy @e3cdb08, partitioning.complete_greedy: the least largest sum"
    return Figure(f"{what}: jobs {jobs} on {machines} machines", 3.0 * machines, 1e-9, source, compute)


def page_faults(
    solver: Callable[[Any], float], pages: Sequence[int], frames: int, moves: str = "serial"
) -> float:
    """Faults of a string of references with some frames: the first of each page, and one for every rest outside of them.

    ``solver``: seconds of a problem of tensors and tiers, where a page comes in within a second and goes out for nothing.
    """
    from planner.solve.combinatorial.tiering import Kernel, Tensor, Tier, TieringProblem

    known = sorted(set(pages))
    kernels = tuple(Kernel(f"reference {i}", 0.0, (known.index(page),)) for i, page in enumerate(pages))
    tensors = tuple(Tensor(f"page {page}", 1.0, constant=True) for page in known)
    tiers = (Tier("frames", float(frames)), Tier("disk", float(len(known)), 1.0, 1.0))
    return len(known) + float(solver(TieringProblem(kernels, tensors, tiers, moves)))


def stall_s(solver: Callable[[Any], float], pages: Sequence[Any], frames: int, fetch_s: float) -> float:
    """Seconds that requests of a second each wait for their pages; the first distinct ones are there at the start.

    ``solver``: seconds of a problem of tensors and tiers; every page is born before the first request, and goes out for nothing.
    """
    from planner.solve.combinatorial.tiering import Kernel, Tensor, Tier, TieringProblem

    known = list(dict.fromkeys(pages))
    kernels = [Kernel(f"page {page}", 0.0, (number,)) for number, page in enumerate(known[frames:], frames)]
    kernels.append(Kernel("start", 0.0, tuple(range(min(frames, len(known))))))
    kernels += [Kernel(f"request {i}", 1.0, (known.index(page),)) for i, page in enumerate(pages)]
    tensors = tuple(Tensor(f"page {page}", 1.0, constant=True) for page in known)
    tiers = (Tier("frames", float(frames)), Tier("disk", float(len(known)), 1.0 / fetch_s, 1.0 / fetch_s))
    return float(solver(TieringProblem(tuple(kernels), tensors, tiers, "scheduled"))) - len(pages)


# -- schedules -----------------------------------------------------------------------------------------------------------


def timeline(
    order: Generator | str, p: int, m: int, v: int = 1, forward_s: float = 1.0, backward_s: float = 2.0, weight_s: float = 0.0
) -> Timeline:  # fmt: skip
    """A step of equal stages without messages, of a device's seconds per micro-batch."""
    from planner.schedule.engine import simulate
    from planner.schedule.order import generator_of, make_order

    v = _chunks(order, v)
    per_copy = v / generator_of(order).placement.copies
    seconds = [[x / per_copy] * (p * v) for x in (forward_s, backward_s, weight_s)]
    return simulate(make_order(order, p, m, v), *seconds)


def _chunks(order: Generator | str, wanted: int) -> int:
    """The chunk count that an order accepts: the wanted one, or its first."""
    from planner.schedule.order import generator_of

    known = generator_of(order).chunks(max(wanted, 2))
    return wanted if wanted in known else known[0]


def makespan_s(
    order: Generator | str, p: int, m: int, v: int = 1, forward_s: float = 1.0, backward_s: float = 2.0, weight_s: float = 0.0
) -> float:  # fmt: skip
    """The length of :func:`timeline`; without an order, one micro-batch after the other."""
    if not order:
        return m * p * (forward_s + backward_s + weight_s)
    return float(timeline(order, p, m, v, forward_s, backward_s, weight_s).makespan_s)


def bubble_s(
    order: Generator | str, p: int, m: int, v: int = 1, forward_s: float = 1.0, backward_s: float = 2.0, weight_s: float = 0.0
) -> float:  # fmt: skip
    """Idle time of every device in :func:`makespan_s`."""
    step_s = makespan_s(order, p, m, v, forward_s, backward_s, weight_s)
    return step_s - m * (forward_s + backward_s + weight_s)


def span_bubble_s(
    order: Generator | str, p: int, m: int, v: int = 1, forward_s: float = 1.0, backward_s: float = 1.0, weight_s: float = 1.0
) -> float:  # fmt: skip
    """Idle time between a device's own first and last operation, the largest over devices; without an order as above."""
    if not order:
        return bubble_s(order, p, m, v, forward_s, backward_s, weight_s)
    return float(timeline(order, p, m, v, forward_s, backward_s, weight_s).span_bubble_s.max())


def in_flight(order: Generator | str, p: int, m: int, v: int = 1, device: int | None = 0) -> float:
    """Chunks whose activations a device (None: the fullest) holds at once, at most."""
    return _most(order, p, m, v, device, None)


def in_flight_to_backward(order: Generator | str, p: int, m: int, v: int = 1) -> float:
    """The same of the fullest device, where what a weight gradient waits with is not counted."""
    from planner.schedule.order import Op

    return _most(order, p, m, v, None, Op.B)


def _most(order: Generator | str, p: int, m: int, v: int, device: int | None, release: Op | None) -> float:
    from planner.schedule.memory import in_flight as count
    from planner.schedule.order import make_order

    if not order:
        return float(v)
    held = count(make_order(order, p, m, _chunks(order, v)), release)
    return float(held.max() if device is None else held[device])
