"""From a choice to a plan: one row through the passes, the schedule engine and the memory timeline.

Everything that a plan reports comes from here, whether the search chose it or the user named it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from planner.engine.block_table import BlockTable
from planner.ledger import Array, AttentionCore, Ledger, Matmul, Resident
from planner.operators.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.pipeline.assignment import Assignment
from planner.pipeline.composer import phase_seconds, recomputed_fraction, tail_seconds
from planner.pipeline.layout import Layout
from planner.pipeline.place import Place, hops_s
from planner.pipeline.step_time import exact_step_s
from planner.plans.attribution import Share, Spend, attribute, spend
from planner.plans.device_memory import DeviceMemory, device_memory
from planner.plans.parts import Part, Priced, price_alike, price_by_strategy
from planner.plans.plan import Estimate, Optimality, Plan
from planner.schedule.order import Generator, generator_of
from planner.solve.space import Choice
from planner.specs.cluster import Cluster
from planner.specs.device import Device
from planner.specs.model import Model
from planner.specs.problem import Problem
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, Context, details
from planner.uncertainty.judgement import judgement
from planner.uncertainty.provenance import weakest_text
from planner.units import counted

__all__ = ["Assembly", "assemble", "model_flop"]


class Assembly(NamedTuple):
    """A plan with the one-row ledgers behind it, for those who want to see every item.

    Attributes:
        plan: the plan.
        parts: its items: one ledger where all layers are treated alike, otherwise one per strategy.
        table: what one block of each kind costs and holds.
        spends: seconds of the step on the busiest device, item by item; the rest is its bubble.
        layout: blocks per virtual stage.
        order: the schedule's order.
        device: the busiest device.
        micro_batches: per pipeline and step.
        recompute_layers: layers recomputed per device, where only some are.
        device_memory: bytes by pool on the first device of each run of equal devices (``layout.run_first``).
        device_cached: what the allocator keeps beyond that on each, as long as there is room.
        fullest: the run with least room left.
        hops_s: from every stage to the next one, where they differ.
    """

    plan: Plan
    parts: Sequence[Part]
    table: BlockTable
    spends: Sequence[Spend]
    layout: Layout
    order: Generator
    device: int
    micro_batches: int
    recompute_layers: int | None
    device_memory: Sequence[Mapping[str, float]]
    device_cached: Sequence[float]
    fullest: int
    hops_s: Array | None = None

    def residents(self) -> Iterator[tuple[Resident, str, float]]:
        """What the plan's blocks hold, each with the plan's name of its block, and its bytes per block."""
        for part in self.parts:
            for item in part.ledger.of(Resident):
                if item.block in part.names:
                    size = float(np.ravel(part.ledger.axes[item.size])[0])
                    yield item, part.names[item.block], size * item.bytes_per_element


def assemble(
    problem: Problem,
    recipe: Mapping[str, Choice],
    knobs: Mapping[str, Any],
    row: Mapping[str, float],
    layout: Layout,
    recompute_layers: int | None,
    optimality: Optimality | None = None,
    useful_flop: float | None = None,
    assignment: Assignment | None = None,
    step_s: float | None = None,
    priced: Priced | None = None,
) -> Assembly:
    """Prices one choice in full.

    Args:
        problem: model, cluster, workload, stack.
        recipe: one choice per slot.
        knobs: the recipe as the passes read it.
        row: mesh degrees and micro-batch size.
        layout: layers per virtual stage.
        recompute_layers: layers recomputed per device under ``recompute=block``.
        optimality: what a search proved; None for a plan that the user named.
        useful_flop: :func:`model_flop` of the problem, where it is already known.
        assignment: strategies of the layers, where they differ; ``layout`` then counts its columns.
        step_s: the schedule engine's step time, where it is already known.
        priced: of :func:`~planner.plans.parts.price_alike`, where the choice was priced beside others.
    """
    workload = problem.workload
    schedule = recipe["schedule"].technique
    assert schedule is not None
    order = generator_of(schedule.order)
    everywhere, hops = Place(problem, 0, {}, row), None
    stage_places = [[everywhere]] * layout.pp
    if assignment is not None and assignment.places:
        stage_places = assignment.stage_places()
        hops = hops_s(problem.cluster, [(one[-1], other[0]) for one, other in pairwise(stage_places)])
    ctx = stage_places[0][0].context(knobs)
    micro_batches = round(float(ctx.micro_batches[0]))
    if assignment is not None:
        priced = price_by_strategy(recipe, knobs, assignment, everywhere)
    parts, table = priced or price_alike(problem, recipe, knobs, [row])[0]
    if step_s is None:
        step_s = float(exact_step_s([table], layout, order, micro_batches, [recompute_layers], hops)[0])
    device = _busiest(table, layout, recompute_layers, micro_batches / layout.copies)
    spends = spend(_shares(parts), table, layout, device, micro_batches / layout.copies, recompute_layers)
    memory = device_memory(problem, table, layout, order, micro_batches, recompute_layers, stage_places)
    repeats = dict(zip(table.kinds, (layout.device_counts.sum(axis=0) / layout.copies).tolist(), strict=True))
    again = recomputed_fraction(layout.device_counts, recompute_layers) * layout.device_counts
    repeated = dict(zip(table.kinds, (again.sum(axis=0) / layout.copies).tolist(), strict=True))
    executed = sum(_executed_flop(part, repeats, repeated) * part.ranks for part in parts)
    useful = model_flop(problem.model, workload) if useful_flop is None else useful_flop
    breakdown = _breakdown(spends, step_s)
    estimate = _estimate(problem, ctx, useful, executed * micro_batches, step_s, breakdown, memory)
    mesh = {name: int(row[name]) for name in ("tp", "cp", "pp", "dp", "ep", "etp")}
    judged = judgement(
        stage_places[device][0].problem, step_s, breakdown, memory.devices[memory.fullest], spends, memory.budget_bytes
    )  # fmt: skip
    estimate = replace(estimate, **judged)
    plan = Plan(
        model=problem.model.name,
        cluster=problem.cluster.name,
        workload={name: list(v) if isinstance(v, tuple) else v for name, v in asdict(workload).items()},
        mesh=mesh,
        knobs=_plan_knobs(recipe, knobs, row, layout, recompute_layers),
        stages=layout.stages if assignment is None else assignment.stage_layers(),
        estimate=estimate,
        optimality=optimality or Optimality("heuristic", None, None, "none: the plan was named"),
        assumptions=(
            *assumptions(problem, [place for some in stage_places for place in some]),
            weakest_text(judged["provenance"]),
        ),
        stack=problem.stack.name,
        permissions=_permissions(recipe, assignment),
        layerwise=None if assignment is None else _layerwise(assignment),
    )
    return Assembly(
        plan, parts, table, spends, layout, order, device, micro_batches, recompute_layers, memory.devices,
        [memory.kept_bytes(run) for run in range(len(memory.devices))], memory.fullest, hops,
    )  # fmt: skip


def assumptions(problem: Problem, places: Sequence[Place]) -> tuple[str, ...]:
    """What every number of a plan rests on."""
    clusters = {place.problem.cluster.name: place.problem.cluster for place in places}
    told = [text for cluster in clusters.values() for text in _of_machine(cluster, named=len(clusters) > 1)]
    software = (
        f"software: stack {problem.stack.name!r}, {problem.stack.framework_bytes.value / 2**30:.1f} GiB framework memory, "
        f"{problem.stack.fragmentation.value:.0%} fragmentation ({problem.stack.framework_bytes.kind})"
    )
    return (*told, software)


def _of_machine(cluster: Cluster, *, named: bool) -> tuple[str, str]:
    """Its fabric and its kernels, with its name where there are several."""
    device, of = cluster.device, f" of {cluster.name}" if named else ""
    tiers = "; ".join(
        f"{t.name}: {counted(t.size, 'device')} at {t.effective_bytes_per_s / 1e9:.0f} GB/s per direction, "
        f"{t.latency_s * 1e6:.1f} µs"
        for t in cluster.tiers
    )
    eff = device.efficiency
    return (
        f"fabric{of}: {tiers}",
        f"kernels{of}: matrix products reach {float(eff.matmul):.0%} of peak at best ({eff.matmul.kind}), fused attention "
        f"{float(eff.attention):.0%} forward and {float(eff.attention_backward):.0%} backward ({eff.attention.kind}), "
        f"memory {float(eff.memory):.0%} ({eff.memory.kind})",
    )


def model_flop(model: Model, workload: TrainWorkload) -> float:
    """FLOP of one sequence, forward and backward, with full (non-causal) attention inside documents and no recompute."""
    seq, encoder_seq = float(workload.seq_len), workload.encoder_seq_len
    documents = max(seq / (workload.document_len or seq), 1.0)
    ledger = baseline(
        model,
        batch=documents,
        seq=seq / documents,
        encoder_seq=None if encoder_seq is None else encoder_seq / documents,
    )
    repeats = {EMBEDDING: 1, HEAD: 1}
    for name in block_order(model):
        repeats[name] = repeats.get(name, 0) + 1
    return sum(_matmul_flop(ledger, item) * repeats[item.block] for item in ledger.of(Matmul))


def _matmul_flop(ledger: Ledger, item: Matmul) -> float:
    axes = ledger.axes
    return float(np.ravel(2.0 * axes[item.m] * axes[item.n] * axes[item.k] * axes[item.groups])[0])


def _shares(parts: Sequence[Part]) -> list[Share]:
    """Shares of all items that the plan holds, by the plan's names of their blocks."""
    return [
        share if share.block == (name := part.names[share.block]) else share._replace(block=name)
        for part in parts
        for share in attribute(part.ledger, part.pricer)
        if share.block in part.names
    ]


def _permissions(recipe: Mapping[str, Choice], assignment: Assignment | None) -> tuple[str, ...]:
    """What the plan's techniques do that changes the result of training."""
    choices = [*recipe.values()]
    for strategy in () if assignment is None else assignment.strategies:
        choices += strategy.values()
    return tuple(sorted({need for c in choices if c.technique for need in c.technique.needs}))


def _layerwise(assignment: Assignment) -> dict[str, Any]:
    """The assignment as JSON values: each strategy's choices, then runs of layers per virtual stage; where they run."""
    placed: dict[str, Any] = {}
    if assignment.places:
        homes = assignment.stage_places()
        stages = [[i for i, own in enumerate(homes) if place in own] for place in assignment.places]
        places = [place.as_dict(own) for place, own in zip(assignment.places, stages, strict=True)]
        placed = {"places": places, "at": list(assignment.at)}
    return {
        "strategies": [
            {slot: _json_value(choice.value) for slot, choice in strategy.items()}
            for strategy in assignment.strategies
        ],
        "stages": [[list(run) for run in runs] for runs in assignment.stages],
        "embedding": assignment.embedding,
        "head": assignment.head,
        **placed,
    }


def _busiest(table: BlockTable, layout: Layout, recompute_layers: int | None, micro_batches: float) -> int:
    """The device with most work and tail."""
    forward, backward, again = phase_seconds(table)
    counts = layout.device_counts
    forward_s = counts @ forward
    backward_s = counts @ backward + recomputed_fraction(counts, recompute_layers) * (counts @ again)
    work_s = micro_batches * (forward_s + backward_s) + tail_seconds(table, counts, forward_s, backward_s)
    return int(np.argmax(work_s[:, 0]))


def _breakdown(spends: Sequence[Spend], step_s: float) -> dict[str, float]:
    """Seconds of the step on one device by category; what is left of the step is the pipeline's bubble."""
    total: dict[str, float] = defaultdict(float)
    for spent in spends:
        total[spent.category] += spent.seconds
    total["pipeline_bubble"] = step_s - sum(total.values())
    return {name: seconds for name, seconds in total.items() if abs(seconds) > 1e-12 * step_s}


def _estimate(
    problem: Problem, ctx: Context, useful_flop: float, executed_flop: float, step_s: float, breakdown: Mapping[str, float],
    memory: DeviceMemory,
) -> Estimate:  # fmt: skip
    workload, devices, groups = problem.workload, problem.cluster.devices, problem.cluster.groups
    peak = sum(group.devices * _peak_flop_per_s(group.device, ctx.format.matmul) for group in groups)
    prices = [_usd_per_hour(problem, group.device) for group in groups]
    usd = [group.devices * price for group, price in zip(groups, prices, strict=True) if price is not None]
    useful = useful_flop * workload.global_batch_size
    return Estimate(
        step_time_s=step_s,
        tokens_per_s_per_device=workload.tokens_per_step / step_s / devices,
        mfu=useful / (step_s * peak),
        hfu=executed_flop / (step_s * peak),
        memory_bytes={"peak": memory.peak_bytes, **memory.devices[memory.fullest]},
        breakdown_s=breakdown,
        fits=memory.fits,
        memory_budget_bytes=memory.budget_bytes,
        host_bytes=max(memory.slower["host"]),
        nvme_bytes=max(memory.slower["nvme"]),
        cxl_bytes=max(memory.slower["cxl"]),
        cached_bytes=memory.cached_bytes,
        joules_per_step=step_s * sum(group.devices * float(group.device.power_w) for group in groups),
        usd_per_step=step_s * sum(usd) / 3600.0 if len(usd) == len(groups) else None,
    )


def _peak_flop_per_s(device: Device, dtype: str) -> float:
    rate = device.peak_flop_per_s[dtype] if device.supports(dtype) else device.vector_flop_per_s
    return float(rate)


def _usd_per_hour(problem: Problem, device: Device) -> float | None:
    if problem.usd_per_device_hour is not None or device.usd_per_hour is None:
        return problem.usd_per_device_hour
    return float(device.usd_per_hour)


def _executed_flop(part: Part, repeats: Mapping[str, float], again: Mapping[str, float]) -> float:
    """FLOP of one micro-batch through all stages, on one rank of each, in a part's blocks: so many, and recomputed ones."""
    ledger, flop = part.ledger, 0.0
    for item in ledger.of(Matmul):
        if item.block in part.names:
            times = again if item.phase == "recompute" else repeats
            flop += _matmul_flop(ledger, item) * times[part.names[item.block]]
    axes = ledger.axes
    for core in ledger.of(AttentionCore):
        if core.block in part.names:
            pairs = axes[core.batch] * axes[core.heads] * axes[core.q] * axes[core.kv] * axes[core.visible]
            one = float(np.ravel(2.0 * pairs * (axes[core.qk_dim] + axes[core.v_dim]))[0]) * core.passes
            times = again if core.phase == "recompute" else repeats
            flop += one * times[part.names[core.block]]
    return flop


def _plan_knobs(
    recipe: Mapping[str, Choice],
    knobs: Mapping[str, Any],
    row: Mapping[str, float],
    layout: Layout,
    recompute_layers: int | None,
) -> dict[str, Any]:
    """Every choice beyond the mesh, as JSON values."""
    values: dict[str, Any] = {
        "micro_batch_size": int(row["micro_batch_size"]),
        "virtual_stages": layout.virtual_stages,
    }
    for slot in SLOTS:
        values[slot] = _json_value(recipe[slot].value)
    values["pipeline_layout"] = layout.split
    values["gradient_dtype"] = knobs.get("gradient_dtype", "fp32")
    values |= {name: knobs[name] for name in details() if name in knobs}
    if recompute_layers is not None:
        values["recompute_layers"] = recompute_layers
    return values


def _json_value(value: str) -> Any:
    """A choice as JSON has it: switches and numbers as such."""
    return {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
