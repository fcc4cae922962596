"""What sequences of a histogram take and hold on groups of each degree, by the engine: the table that assigns them.

A group of d ranks shares one sequence by context parallelism; the model's states are sharded over all devices (ZeRO stage
3), and their gathers, which every assignment needs alike, are left out. What a rank keeps of a sequence is held until its
backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from planner.costs.optimizer import FUSED_UPDATES, optimizer_state_bytes
from planner.costs.precision import dtype_bytes
from planner.engine.block_table import tabulate
from planner.engine.pricer import Pricer
from planner.errors import Infeasible, Problem, SpecError
from planner.ledger import Array
from planner.mesh import Mesh
from planner.operators.baseline import EMBEDDING, HEAD, block_order
from planner.pipeline.composer import phase_seconds
from planner.schedule.order import generator_of, make_order
from planner.schedule.times import operation_times
from planner.solve.combinatorial.sequences import SequenceProblem
from planner.solve.passes import run_passes
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.parameters import parameter_count
from planner.specs.stack import Stack
from planner.specs.workload import TrainWorkload
from planner.technique import discover
from planner.units import format_bytes

__all__ = ["pipelined_s", "sequence_problem"]

_FIRST_OUTSIDE_A_GROUP = "tensor_overlap"


def sequence_problem(
    model: Model, cluster: Cluster, stack: Stack, workload: TrainWorkload, histogram: Mapping[int, int],
    degrees: Sequence[int], knobs: Mapping[str, str], budget_bytes: float | None = None,
) -> SequenceProblem:  # fmt: skip
    """The problem of one optimizer step.

    Args:
        model: what is trained.
        cluster: its devices form the groups.
        stack: the software.
        workload: optimizer and document length; length and batch are the histogram's.
        histogram: sequences of every length.
        degrees: of groups; those that no length can be cut to are left out.
        knobs: choices of kernels and of context parallelism (``context=a2a``: Ulysses).
        budget_bytes: for what is kept of sequences, on each device; None: what states and software leave.

    Raises:
        SpecError: a rule excludes all degrees for a length.
        Infeasible: states alone exceed the memory.
    """
    pricer = Pricer(cluster, stack)
    order = block_order(model)
    kinds = (*dict.fromkeys(order), EMBEDDING, HEAD)
    each = np.array([float(order.count(kind)) if kind in order else 1.0 for kind in kinds])
    cp, one = np.array(degrees, dtype=np.float64), np.ones(len(degrees))
    seconds, phases, held, states = [], [], [], 0.0
    for length in histogram:
        mesh = Mesh(one, cp, one, one, one, one)
        job = replace(workload, seq_len=length)
        ledger, ctx, allowed, reason = run_passes(
            model, cluster, stack, job, mesh, one, _FIRST_OUTSIDE_A_GROUP, knobs
        )
        if not allowed.any():
            raise SpecError(
                Problem(f"sequences of {length:,} tokens", reason, "lengths that some degree divides")
            )
        table = tabulate(ledger, pricer, kinds, len(degrees))
        forward, backward, _ = phase_seconds(table)
        seconds.append(np.where(allowed, each @ (forward + backward), np.inf))
        phases.append([each @ forward, each @ table["backward_s"], each @ table["weight_s"]])
        held.append(each @ (table["saved_bytes"] + table["recomputed_bytes"]))
        master = None if ctx.format.master else 0.0  # None: as wide as the optimizer keeps them
        gradient = 0.0 if workload.optimizer in FUSED_UPDATES else dtype_bytes(ctx.gradient_dtype)
        states = dtype_bytes(ctx.format.activation) + gradient + float(
            optimizer_state_bytes(workload.optimizer, master_bytes=master)
        )  # fmt: skip
    sharded = states * parameter_count(model) / cluster.devices
    room = float(cluster.device.memory_bytes) - float(stack.framework_bytes) - sharded
    if budget_bytes is None and room <= 0.0:
        limit = format_bytes(float(cluster.device.memory_bytes))
        raise Infeasible(
            Problem(
                "memory",
                f"states take {format_bytes(sharded)} per device",
                f"less than {limit}",
                "Use more devices.",
            )
        )
    return SequenceProblem(
        tuple(histogram), tuple(histogram.values()), tuple(degrees), np.array(seconds), np.array(held), cluster.devices,
        room if budget_bytes is None else budget_bytes, phases_s=np.array(phases).transpose(1, 0, 2),
    )  # fmt: skip


def pipelined_s(schedule: str, stages: int, phases_s: Array) -> tuple[float, float]:
    """Seconds of a step whose micro-batches differ, on equal stages of a pipeline without messages, in the order of a schedule;
    and how long its busiest device idles.

    Args:
        schedule: a choice of the slot ``schedule``.
        stages: devices of the pipeline.
        phases_s: (3, micro-batches) forward, input gradients and weight gradients of the whole model.

    Raises:
        SpecError: there is no such schedule.
        InvalidPlan: it does not run on so many devices or with so many micro-batches.
    """
    known = {c: t for t in discover("training").values() if t.slot == "schedule" for c in t.choices}
    if schedule not in known:
        raise SpecError(Problem("--schedule", schedule, f"one of {', '.join(sorted(known))}"))
    generator = generator_of(known[schedule].order)
    v = generator.chunks(2)[0]
    order = make_order(generator, stages, phases_s.shape[1], v)
    forward, inputs, weights = phases_s * (generator.placement.copies / (stages * v))
    split = [inputs, weights] if order.splits_backward else [inputs + weights, np.zeros_like(weights)]
    each = np.broadcast_to(np.array([forward, *split])[:, None, :], (3, order.n_virtual, phases_s.shape[1]))
    _, end = operation_times(order, each)
    step_s = float(end.max())
    return step_s, step_s - float(phases_s.sum()) / stages
