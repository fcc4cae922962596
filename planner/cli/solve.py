"""``planner solve``: optimisations that are plans of their own, each with its proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from planner.cli.options import Json, option
from planner.cli.solve_curriculum import curriculum
from planner.cli.solve_flow import flow
from planner.cli.solve_job import (
    Backend,
    Deadline,
    SolveJob,
    read_deadline,
    read_degrees,
    read_histogram,
    read_mesh,
    read_share,
)
from planner.cli.solve_peers import peers
from planner.cli.solve_rlhf import rlhf

_File = Annotated[
    str, typer.Argument(help="The problem as JSON (docs/solvers.md has the formats).", metavar="FILE")
]
_Optional_file = Annotated[
    str | None,
    typer.Argument(
        help="A graph as JSON (docs/solvers.md has the format); left out: --model.",
        metavar="[FILE]",
        show_default=False,
    ),
]
_Model = Annotated[str | None, option("--model", text="Shipped model, .toml, or config.json.")]
_Cluster = Annotated[
    str | None, option("--cluster", text="DEVICE:NODESxDEVICES, a shipped cluster, or .toml.")
]
_Batch = Annotated[
    str, option("--batch", text="Sequences in one micro-batch, before it is split [1].", metavar="N")
]
_SeqLen = Annotated[str | None, option("--seq-len", text="Tokens per sequence.", metavar="N")]
_Fix = Annotated[
    list[str] | None,
    option("--fix", text="A choice of formats or kernels, e.g. precision=fp8.", metavar="KNOB=VALUE"),
]
_Memory = Annotated[str | None, option("--memory", text="Limit, e.g. 60GiB.", metavar="SIZE")]
_Lengths = Annotated[
    str | None,
    option("--lengths", text="Sequences of one step, LENGTH:COUNT,… e.g. 4096:128,65536:4.", metavar="LIST"),
]
_Layers = Annotated[str | None, option("--layers", text="The model's first N layers [all].", metavar="N")]
_StackName = Annotated[str, option("--stack", text="Software stack [default].", metavar="NAME")]


def sharding(
    file: _Optional_file = None, model: _Model = None, cluster: _Cluster = None, mesh: Annotated[
        str | None, option("--mesh", text="Axes of the device mesh, innermost last, e.g. 4x8.", metavar="AxB")
    ] = None, layers: _Layers = None,
    batch: _Batch = "1", seq_len: _SeqLen = None, micro_batches: Annotated[
        str, option("--micro-batches", text="Per optimizer step, which share the sum of gradients [1].", metavar="N")
    ] = "1", memory: _Memory = None, fix: _Fix = None, stack: _StackName = "default", elimination: Annotated[
        bool, typer.Option("--elimination/--no-elimination", help="Without: the whole problem as one integer program.")
    ] = True, backend: Backend = "scipy", deadline: Deadline = "60s", as_json: Json = False,
) -> None:  # fmt: skip
    """What every operator splits along every axis of a device mesh, at the least time within memory.

    Operators are those of a model's layers, or of a graph in a file. Compute, collectives and changes of layout are the engine's.
    """
    from planner.report.optimum import show_sharding
    from planner.solve.graph.graph_file import read_graph
    from planner.solve.graph.operators import model_graph
    from planner.solve.graph.sharding import shard

    job = SolveJob(file, model, cluster, batch, seq_len, fix, stack, memory, deadline, backend)
    degrees = job.attempt(read_mesh, mesh)
    count = None if layers is None else job.whole("--layers", layers)
    steps = job.whole("--micro-batches", micro_batches)
    job.raise_if_any()
    assert degrees is not None
    if file is not None:
        graph = read_graph(file)
    else:
        graph = model_graph(job.model, job.cluster, job.stack, job.workload(), layers=count, knobs=job.knobs)
    found = shard(
        graph, job.cluster, job.stack, degrees, budget_bytes=job.memory_bytes, micro_batches=steps,
        elimination=elimination, backend=backend, time_limit_s=job.deadline_s,
    )  # fmt: skip
    _show(found.as_dict(), show_sharding, as_json)


def recompute(
    file: _Optional_file = None, model: _Model = None, cluster: _Cluster = None, batch: _Batch = "1", seq_len: _SeqLen = None,
    layer: Annotated[str, option("--layer", text="Which layer of the model [0].", metavar="N")] = "0", memory: _Memory = None,
    points: Annotated[str, option("--points", text="Of the front, without --memory [8].", metavar="N")] = "8",
    fix: _Fix = None, stack: _StackName = "default", solver: Annotated[
        str, option("--solver", text="search or ilp; both give the same answer [search].", metavar="NAME")
    ] = "search", backend: Backend = "scipy", deadline: Deadline = "60s", as_json: Json = False,
) -> None:  # fmt: skip
    """Which tensors of a layer to keep and which to compute again.

    With --memory, the schedule of least time whose peak stays below it; without, the front of time against what is kept from
    forward to backward.
    """
    from planner.report.optimum import show_schedules
    from planner.solve.combinatorial.recompute import SOLVERS, cheapest_schedule, front
    from planner.solve.graph.operators import model_graph
    from planner.solve.graph.recompute import layer_graph, point
    from planner.solve.problem_files import read_compute_graph

    job = SolveJob(
        file, model, cluster, batch, seq_len, fix, stack, memory, deadline, backend, priced=file is None
    )
    number = job.whole("--layer", layer, least=0)
    wanted = job.whole("--points", points)
    job.check("--solver", solver, SOLVERS)
    job.raise_if_any()
    if file is not None:
        graph = read_compute_graph(file)
    else:
        operators = model_graph(
            job.model, job.cluster, job.stack, job.workload(), layers=number + 1, knobs=job.knobs
        )
        graph = layer_graph(operators, number, job.cluster, job.stack)
    if job.memory_bytes is None:
        found = front(graph, points=wanted, solver=solver, time_limit_s=job.deadline_s)
    else:
        limit, left_s = job.memory_bytes, job.deadline_s
        found = [
            cheapest_schedule(graph, budget_bytes=limit, solver=solver, backend=backend, time_limit_s=left_s)
        ]
    content = {"once_s": graph.once_s, "schedules": [point(schedule) for schedule in found]}
    _show(content, lambda c: show_schedules(c["schedules"], c["once_s"]), as_json)


def tiers(
    file: _Optional_file = None, model: _Model = None, cluster: _Cluster = None, layers: _Layers = None, batch: _Batch = "1",
    seq_len: _SeqLen = None, memory: _Memory = None, moves: Annotated[
        str, option("--moves", text="serial (kernels wait), overlapped or scheduled [serial].", metavar="NAME")
    ] = "serial", fix: _Fix = None, stack: _StackName = "default", backend: Backend = "scipy", deadline: Deadline = "60s",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Where tensors rest between the kernels that use them: device memory, host memory, CXL, NVMe.

    Of a model, every device of the cluster holds an equal share of the states; of a file, what it says.
    """
    from planner.report.optimum import show_placement
    from planner.solve.combinatorial.migrations import SCHEDULED, migrate
    from planner.solve.combinatorial.tiering import MOVES, place
    from planner.solve.problem_files import read_tiers
    from planner.solve.tier_costs import tier_problem

    job = SolveJob(
        file, model, cluster, batch, seq_len, fix, stack, memory, deadline, backend, priced=file is None
    )
    count = None if layers is None else job.whole("--layers", layers)
    job.check("--moves", moves, (*MOVES, SCHEDULED))
    job.raise_if_any()
    if file is not None:
        problem = read_tiers(file)
    else:
        problem = tier_problem(
            job.model, job.cluster, job.stack, job.workload(), layers=count, knobs=job.knobs, moves=moves,
            device_bytes=job.memory_bytes,
        )  # fmt: skip
    solve = migrate if problem.moves == SCHEDULED else place
    found = solve(problem, backend=backend, time_limit_s=job.deadline_s)
    content = {
        "time_s": found.time_s, "kernels_s": found.kernels_s, "peak_bytes": found.peak_bytes,
        "rests": [asdict(rest) for rest in found.rests], "certificate": found.certificate.as_dict(),
    }  # fmt: skip
    _show(content, show_placement, as_json)


def sequences(
    file: _Optional_file = None, model: _Model = None, cluster: _Cluster = None, lengths: _Lengths = None, degrees: Annotated[
        str | None, option("--degrees", text="Ranks that a group may have [powers of 2 to all].", metavar="LIST")
    ] = None, memory: _Memory = None, fix: _Fix = None, stack: _StackName = "default", gap: Annotated[
        str, option("--gap", text="Proof to stop at, e.g. 1% [0].", metavar="SHARE")
    ] = "0", backend: Backend = "scipy", deadline: Deadline = "60s", as_json: Json = False,
) -> None:  # fmt: skip
    """Which group of devices works on which sequences of a step.

    Groups share a sequence by context parallelism (--fix context=a2a: Ulysses); the slowest group is made as fast as can be.
    """
    from planner.report.optimum import show_groups
    from planner.solve.combinatorial.sequences import assign_sequences
    from planner.solve.problem_files import read_sequences
    from planner.solve.sequence_costs import sequence_problem

    job = SolveJob(
        file,
        model,
        cluster,
        "1",
        None if file is None else "1",
        fix,
        stack,
        memory,
        deadline,
        backend,
        priced=file is None,
        length=False,
    )
    histogram = None if file is not None else job.attempt(read_histogram, lengths)
    sizes = None if degrees is None else job.attempt(read_degrees, degrees)
    share = job.attempt(read_share, gap)
    job.raise_if_any()
    if file is not None:
        problem = read_sequences(file)
        if job.memory_bytes is not None:
            problem = replace(problem, budget_bytes=job.memory_bytes)
    else:
        assert histogram is not None
        devices = job.cluster.devices
        sizes = sizes or [2**i for i in range(devices.bit_length()) if 2**i <= devices]
        problem = sequence_problem(
            job.model,
            job.cluster,
            job.stack,
            job.workload(1024),
            histogram,
            sizes,
            job.knobs,
            job.memory_bytes,
        )
    found = assign_sequences(problem, backend=backend, gap=share or 0.0, time_limit_s=job.deadline_s)
    groups = [
        {"degree": degree, "sequences": [int(n) for n in row], "time_s": seconds}
        for degree, row, seconds in zip(found.degrees, found.counts, found.group_s, strict=True)
    ]
    content = {
        "time_s": found.time_s, "lengths": list(problem.lengths), "groups": groups, "certificate": found.certificate.as_dict(),
    }  # fmt: skip
    _show(content, show_groups, as_json)


def experts(
    file: _File, backend: Backend = "scipy", deadline: Deadline = "60s", as_json: Json = False
) -> None:
    """Which device holds which expert: even loads, or tokens that stay where they are from layer to layer."""
    from planner.report.optimum import show_alignment, show_balance
    from planner.solve.combinatorial.experts import align, balance, in_order, moved
    from planner.solve.problem_files import read_experts

    problem, left_s = read_experts(file), read_deadline(deadline)
    if not problem.transitions:
        found = balance(
            problem.loads, problem.devices, slots=problem.slots, backend=backend, time_limit_s=left_s
        )
        _show(
            {"device": found.device, "loads": found.loads, "certificate": found.certificate.as_dict()},
            show_balance,
            as_json,
        )
        return
    aligned = align(problem.transitions, problem.devices, time_limit_s=left_s)
    plain = in_order(len(aligned.device), len(aligned.device[0]), problem.devices)
    content = {
        "device": aligned.device, "moved": aligned.moved, "moved_in_order": moved(problem.transitions, plain),
        "total": aligned.total, "certificate": aligned.certificate.as_dict(),
    }  # fmt: skip
    _show(content, show_alignment, as_json)


def ranks(file: _File, deadline: Deadline = "60s", as_json: Json = False) -> None:
    """Which rank runs on which node, where bandwidths between nodes differ."""
    from planner.report.optimum import show_ranks
    from planner.solve.combinatorial.ranks import in_order, map_ranks
    from planner.solve.problem_files import read_ranks

    problem = read_ranks(file)
    found = map_ranks(problem, time_limit_s=read_deadline(deadline))
    content = {
        "node": found.node, "time_s": found.time_s, "time_in_order_s": problem.seconds(in_order(problem)),
        "certificate": found.certificate.as_dict(),
    }  # fmt: skip
    _show(content, show_ranks, as_json)


def micro_batches(
    model: _Model = None, cluster: _Cluster = None, lengths: _Lengths = None, stages: Annotated[
        str, option("--stages", text="Of the pipeline [1].", metavar="N")
    ] = "1", schedule: Annotated[
        str, option("--schedule", text="Whose order the micro-batches run in [1f1b].", metavar="NAME")
    ] = "1f1b", memory: _Memory = None, fix: _Fix = None, stack: _StackName = "default", as_json: Json = False,
) -> None:  # fmt: skip
    """Which sequences of a step run together on a pipeline, each micro-batch padded to its longest.

    The sum of all micro-batches and the fill of the pipeline by the longest is least. Devices are those of one pipeline, with an
    equal share of the layers each. What a schedule makes of them is the longest path through its order.
    """
    from planner.report.optimum import show_micro_batches
    from planner.solve.combinatorial.sequences import micro_batches as cut
    from planner.solve.sequence_costs import pipelined_s, sequence_problem

    job = SolveJob(None, model, cluster, "1", None, fix, stack, memory, "60s", "scipy", length=False)
    histogram = job.attempt(read_histogram, lengths)
    count = job.whole("--stages", stages)
    job.raise_if_any()
    problem = sequence_problem(
        job.model,
        job.cluster,
        job.stack,
        job.workload(1024),
        histogram,
        [1],
        job.knobs,
        job.memory_bytes,
    )
    price = {
        n: (float(s[0]), float(m[0]))
        for n, s, m in zip(problem.lengths, problem.time_s, problem.memory_bytes, strict=True)
    }
    found = cut(
        [length for length, n in histogram.items() for _ in range(n)],
        lambda n, length: n * price[length][0] / count,
        lambda n, length: (
            n * price[length][1] <= problem.budget_bytes
        ),  # the first of p stages holds p micro-batches of 1/p
        count,
    )
    ordered = sorted(length for length, n in histogram.items() for _ in range(n))
    assert problem.phases_s is not None
    buckets = [problem.lengths.index(ordered[end - 1]) for _, end in found.cuts]
    sizes = [end - begin for begin, end in found.cuts]
    step_s, bubble_s = pipelined_s(schedule, count, problem.phases_s[:, buckets, 0] * sizes)
    content = {
        "time_s": found.time_s, "padding_tokens": found.padding_tokens,
        "micro_batches": [{"sequences": end - begin, "length": ordered[end - 1]} for begin, end in found.cuts],
        "schedule": schedule, "step_s": step_s, "bubble_s": bubble_s, "certificate": found.certificate.as_dict(),
    }  # fmt: skip
    _show(content, show_micro_batches, as_json)


def blocks(
    model: _Model = None, cluster: _Cluster = None, seq_len: Annotated[
        str | None, option("--seq-len", text="Tokens per sequence. Required.", metavar="N")
    ] = None, batch: Annotated[
        str, option("--batch", text="Sequences of a micro-batch [1].", metavar="N")
    ] = "1", memory: _Memory = None, fix: _Fix = None, stack: _StackName = "default", backend: Backend = "scipy",
    deadline: Deadline = "60s", as_json: Json = False,
) -> None:  # fmt: skip
    """Which devices of a pipeline hold which half layers, neighbours or not; the busiest device has the least work."""
    from planner.errors import Infeasible
    from planner.report.blocks import show_blocks
    from planner.solve.block_costs import model_blocks
    from planner.solve.combinatorial.blocks import contiguous, deal_blocks

    job = SolveJob(None, model, cluster, batch, seq_len, fix, stack, memory, deadline, backend)
    job.raise_if_any()
    devices = job.cluster.devices
    room = job.memory_bytes or float(job.cluster.device.memory_bytes) - float(job.stack.framework_bytes)
    found = model_blocks(job.model, job.cluster, job.stack, job.workload(), job.knobs)
    dealt = deal_blocks(found, devices, room, backend=backend, time_limit_s=job.deadline_s)
    try:
        runs = contiguous(found, devices, room)
    except Infeasible:
        runs = None
    assert dealt.certificate is not None
    content = {
        "time_s": dealt.time_s, "messages": dealt.cuts,
        "runs_s": None if runs is None else runs.time_s, "runs_messages": None if runs is None else runs.cuts,
        "blocks": [{**asdict(block), "device": device} for block, device in zip(found, dealt.device, strict=True)],
        "certificate": dealt.certificate.as_dict(),
    }  # fmt: skip
    _show(content, show_blocks, as_json)


VERBS = {
    "blocks": blocks,
    "sharding": sharding,
    "recompute": recompute,
    "tiers": tiers,
    "sequences": sequences,
    "micro-batches": micro_batches,
    "experts": experts,
    "ranks": ranks,
    "peers": peers,
    "flow": flow,
    "rlhf": rlhf,
    "curriculum": curriculum,
}


def _show(content: dict[str, Any], show: Callable[[Any], None], as_json: bool) -> None:
    from planner.cli.output import print_json

    if as_json:
        print_json(content)
    else:
        show(content)
