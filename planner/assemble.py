"""From a choice to a plan: one row through the passes, the schedule engine and the memory timeline.

Everything that a plan reports comes from here, whether the search chose it or the user named it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from planner.assignment import Assignment, joined
from planner.attribution import Share, Spend, attribute, spend
from planner.baseline import EMBEDDING, HEAD, baseline, block_order
from planner.engine import BlockTable, Pricer, tabulate
from planner.layout import BOUNDARY, Layout
from planner.ledger import Array, AttentionCore, Ledger, Matmul, Resident
from planner.mesh import Mesh
from planner.pipeline import SLOWER, memory_parts, phase_seconds, recomputed_fraction, tail_seconds
from planner.plan import Estimate, Optimality, Plan
from planner.schedule.engine import simulate
from planner.schedule.order import Generator, generator_of, make_order, repeated
from planner.solve.space import Choice
from planner.specs.model import Model
from planner.specs.problem import Problem
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, Context, details
from planner.uncertainty.judgement import judgement
from planner.uncertainty.provenance import weakest_text

__all__ = ["Assembly", "Part", "assemble", "exact_step_s", "model_flop", "stage_seconds"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The one-row ledger of one strategy, and the plan's names of those of its block kinds that the plan holds."""

    ledger: Ledger
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
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

    def residents(self) -> Iterator[tuple[Resident, str, float]]:
        """What the plan's blocks hold, each with the plan's name of its block, and its bytes per block."""
        for part in self.parts:
            for item in part.ledger.of(Resident):
                if item.block in part.names:
                    size = float(np.ravel(part.ledger.axes[item.size])[0])
                    yield item, part.names[item.block], size * item.bytes_per_element


def exact_step_s(
    tables: Sequence[BlockTable],
    layout: Layout,
    schedule: Generator | str,
    micro_batches: int,
    recompute_layers: Sequence[int | None],
) -> Array:
    """Step times of candidates that share layout, schedule and micro-batch count, by the schedule engine.

    Without a barrier between steps, what one more step adds to two, and the longest tail after it.

    Args:
        tables: one-row block tables.
        recompute_layers: per candidate, or None.
    """
    table = replace(tables[0], values=np.concatenate([t.values for t in tables], axis=2))
    fraction = np.array([float(recomputed_fraction(layout, layers)) for layers in recompute_layers])
    generator = generator_of(schedule)
    stages_s, hop_s, tail_s = stage_seconds(table, layout, generator, fraction)
    if layout.pp == 1:
        step_s: Array = micro_batches * np.sum(stages_s, axis=(0, 1)) / layout.copies + tail_s[0]
        return step_s
    p, v = layout.pp, layout.virtual_stages
    if generator.barrier:
        return simulate(
            make_order(generator, p, micro_batches, v), *stages_s, hop_s=hop_s, tail_s=tail_s
        ).makespan_s
    two, three = (
        simulate(repeated(generator, p, micro_batches, v, steps), *stages_s, hop_s=hop_s) for steps in (2, 3)
    )
    # A slow device may still be catching up in the third step: no period is shorter than its work.
    busy_s = (three.busy_s - two.busy_s).max(axis=0)
    period_s: Array = np.maximum(three.makespan_s - two.makespan_s, busy_s) + tail_s.max(axis=0)
    return period_s


def stage_seconds(
    table: BlockTable, layout: Layout, generator: Generator, recomputed: Array | float
) -> tuple[list[Array], Array, Array]:
    """Seconds of a micro-batch in every virtual stage by operation (F, B and, where they are split, W), of a hop, and of each
    device's tail: [(stages, rows)], (rows,), (devices, rows).

    ``recomputed`` is the fraction of the layers that is recomputed, which belongs to the backward.
    """
    forward, backward, again = phase_seconds(table)
    backward = backward + again * recomputed
    counts = layout.device_counts
    tail_s = tail_seconds(table, counts, counts @ forward, counts @ backward)
    stages_s = [layout.counts @ forward, layout.counts @ backward]
    if generator.splits_backward:
        weight_s = layout.counts @ table["weight_s"]
        stages_s = [stages_s[0], stages_s[1] - weight_s, weight_s]
    return stages_s, table["forward_s"][table.kinds.index(BOUNDARY)], tail_s


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
    """
    ctx = _context(problem, knobs, row)
    workload = problem.workload
    schedule = recipe["schedule"].technique
    assert schedule is not None
    order = generator_of(schedule.order)
    micro_batches = round(float(ctx.micro_batches[0]))
    pricer = Pricer(problem.cluster, problem.stack)
    parts, table = _priced(problem, recipe, ctx, pricer, assignment)
    if step_s is None:
        step_s = float(exact_step_s([table], layout, order, micro_batches, [recompute_layers])[0])
    device = _busiest(table, layout, recompute_layers, micro_batches / layout.copies)
    spends = spend(
        _shares(parts, pricer), table, layout, device, micro_batches / layout.copies, recompute_layers
    )
    communicators = sum(float(row[name] > 1) for name in ("tp", "cp", "dp", "pp", "ep"))
    held_parts = memory_parts(
        table,
        layout,
        order,
        np.array([float(micro_batches)]),
        problem.stack,
        communicators,
        recompute_layers,
    )
    slower = {tier: float(held_parts.pop(tier).max()) for tier in SLOWER}
    cached = held_parts.pop("cached")
    devices = [
        {pool: float(held[run, 0]) for pool, held in held_parts.items() if held[run, 0]}
        for run in range(len(layout.run_first))
    ]
    fullest = max(devices, key=lambda pools: sum(pools.values()))
    peak = sum(fullest.values())
    kept = (sum(pools.values()) + float(beside) for pools, beside in zip(devices, cached[:, 0], strict=True))
    budget = problem.memory_budget_bytes
    repeats = dict(zip(table.kinds, (layout.device_counts.sum(axis=0) / layout.copies).tolist(), strict=True))
    fraction = float(recomputed_fraction(layout, recompute_layers))
    executed = sum(_executed_flop(part, repeats, fraction) for part in parts)
    useful = model_flop(problem.model, workload) if useful_flop is None else useful_flop
    estimate = _estimate(
        problem,
        ctx,
        useful,
        executed,
        step_s,
        _breakdown(spends, step_s),
        {"peak": peak, **fullest},
        slower,
        max(min(max(kept), budget) - peak, 0.0),
    )
    mesh = {name: int(row[name]) for name in ("tp", "cp", "pp", "dp", "ep", "etp")}
    judged = judgement(problem, mesh, step_s, peak, spends)
    estimate = replace(estimate, **judged)
    plan = Plan(
        model=problem.model.name,
        cluster=problem.cluster.name,
        workload={name: list(v) if isinstance(v, tuple) else v for name, v in asdict(workload).items()},
        mesh=mesh,
        knobs=_plan_knobs(recipe, knobs, row, layout, recompute_layers),
        stages=tuple(round(float(n)) for n in layout.counts[:, :-3].sum(axis=1)),
        estimate=estimate,
        optimality=optimality or Optimality("heuristic", None, None, "none: the plan was named"),
        assumptions=(*assumptions(problem), weakest_text(judged["provenance"])),
        stack=problem.stack.name,
        permissions=_permissions(recipe, assignment),
        layerwise=None if assignment is None else _layerwise(assignment),
    )
    return Assembly(
        plan, parts, table, spends, layout, order, device, micro_batches, recompute_layers, devices
    )


def assumptions(problem: Problem) -> tuple[str, ...]:
    """What every number of this problem rests on."""
    cluster, device = problem.cluster, problem.cluster.device
    tiers = "; ".join(
        f"{t.name}: {t.size} devices at {t.effective_bytes_per_s / 1e9:.0f} GB/s per direction, {t.latency_s * 1e6:.1f} µs"
        for t in cluster.tiers
    )
    eff = device.efficiency
    return (
        f"fabric: {tiers}",
        f"kernels: matrix products reach {float(eff.matmul):.0%} of peak at best ({eff.matmul.kind}), fused attention "
        f"{float(eff.attention):.0%} forward and {float(eff.attention_backward):.0%} backward ({eff.attention.kind}), "
        f"memory {float(eff.memory):.0%} ({eff.memory.kind})",
        f"software: stack {problem.stack.name!r}, {problem.stack.framework_bytes.value / 2**30:.1f} GiB framework memory, "
        f"{problem.stack.fragmentation.value:.0%} fragmentation ({problem.stack.framework_bytes.kind})",
    )


def model_flop(model: Model, workload: TrainWorkload) -> float:
    """FLOP of one sequence, forward and backward, with full (non-causal) attention and no recompute."""
    ledger = baseline(model, batch=1.0, seq=float(workload.seq_len), encoder_seq=workload.encoder_seq_len)
    repeats = {EMBEDDING: 1, HEAD: 1}
    for name in block_order(model):
        repeats[name] = repeats.get(name, 0) + 1
    return sum(_matmul_flop(ledger, item) * repeats[item.block] for item in ledger.of(Matmul))


def _matmul_flop(ledger: Ledger, item: Matmul) -> float:
    axes = ledger.axes
    return float(np.ravel(2.0 * axes[item.m] * axes[item.n] * axes[item.k] * axes[item.groups])[0])


def _priced(
    problem: Problem, recipe: Mapping[str, Choice], ctx: Context, pricer: Pricer, assignment: Assignment | None
) -> tuple[list[Part], BlockTable]:  # fmt: skip
    """The plan's ledgers, and the table of all of its blocks."""
    order = block_order(problem.model)
    kinds = (*dict.fromkeys(order), EMBEDDING, HEAD, BOUNDARY)
    if assignment is None:
        ledger = _ledger(problem, recipe, ctx)
        return [Part(ledger, {kind: kind for kind in kinds})], tabulate(ledger, pricer, kinds, 1)
    ledgers = []
    for strategy in assignment.strategies:
        values = {slot: choice.value for slot, choice in strategy.items()}
        ledgers.append(_ledger(problem, {**recipe, **strategy}, replace(ctx, knobs={**ctx.knobs, **values})))
    columns, names = assignment.columns(order), assignment.names(order)
    parts = [
        Part(ledger, {kind: name for (kind, s), name in zip(columns, names, strict=True) if s == number})
        for number, ledger in enumerate(ledgers)
    ]
    return parts, joined([tabulate(ledger, pricer, kinds, 1) for ledger in ledgers], columns, names)


def _ledger(problem: Problem, recipe: Mapping[str, Choice], ctx: Context) -> Ledger:
    """The one-row ledger of a recipe."""
    workload = problem.workload
    ledger = baseline(
        problem.model, batch=ctx.micro_batch_size, seq=float(workload.seq_len), encoder_seq=workload.encoder_seq_len,
        document_len=workload.document_len,
    )  # fmt: skip
    for slot in SLOTS:
        technique = recipe[slot].technique
        if technique is not None:
            ledger = technique.apply(ledger, ctx)
    return ledger


def _shares(parts: Sequence[Part], pricer: Pricer) -> list[Share]:
    """Shares of all items that the plan holds, by the plan's names of their blocks."""
    return [
        replace(share, block=part.names[share.block])
        for part in parts
        for share in attribute(part.ledger, pricer)
        if share.block in part.names
    ]


def _permissions(recipe: Mapping[str, Choice], assignment: Assignment | None) -> tuple[str, ...]:
    """What the plan's techniques do that changes the result of training."""
    choices = [*recipe.values()]
    for strategy in () if assignment is None else assignment.strategies:
        choices += strategy.values()
    return tuple(sorted({need for c in choices if c.technique for need in c.technique.needs}))


def _layerwise(assignment: Assignment) -> dict[str, Any]:
    """The assignment as JSON values: each strategy's choices, then runs of layers per virtual stage."""
    return {
        "strategies": [
            {slot: _json_value(choice.value) for slot, choice in strategy.items()}
            for strategy in assignment.strategies
        ],
        "stages": [[list(run) for run in runs] for runs in assignment.stages],
        "embedding": assignment.embedding,
        "head": assignment.head,
    }


def _context(problem: Problem, knobs: Mapping[str, Any], row: Mapping[str, float]) -> Context:
    v = {name: np.array([float(value)]) for name, value in row.items()}
    mesh = Mesh(v["tp"], v["cp"], v["dp"], v["pp"], v["ep"], v["etp"])
    return Context(
        problem.model, problem.cluster, problem.workload, problem.stack, mesh, v["micro_batch_size"], knobs
    )


def _busiest(table: BlockTable, layout: Layout, recompute_layers: int | None, micro_batches: float) -> int:
    """The device with most work and tail."""
    forward, backward, again = phase_seconds(table)
    backward = backward + again * recomputed_fraction(layout, recompute_layers)
    counts = layout.device_counts
    work_s = micro_batches * (counts @ (forward + backward)) + tail_seconds(
        table, counts, counts @ forward, counts @ backward
    )
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
    memory_bytes: Mapping[str, float], slower: Mapping[str, float], cached_bytes: float,
) -> Estimate:  # fmt: skip
    workload, cluster, device = problem.workload, problem.cluster, problem.cluster.device
    devices = cluster.devices
    peak = (
        float(device.peak_flop_per_s[ctx.format.matmul])
        if device.supports(ctx.format.matmul)
        else float(device.vector_flop_per_s)
    )
    useful = useful_flop * workload.global_batch_size
    executed = executed_flop * float((ctx.micro_batches * ctx.mesh.tp * ctx.mesh.cp * ctx.mesh.dp)[0])
    price = problem.usd_per_device_hour
    if price is None and device.usd_per_hour is not None:
        price = float(device.usd_per_hour)
    budget = problem.memory_budget_bytes
    return Estimate(
        step_time_s=step_s,
        tokens_per_s_per_device=workload.tokens_per_step / step_s / devices,
        mfu=useful / (step_s * devices * peak),
        hfu=executed / (step_s * devices * peak),
        memory_bytes=memory_bytes,
        breakdown_s=breakdown,
        fits=memory_bytes["peak"] <= budget
        and all(slower[tier] <= capacity for tier, capacity in cluster.slower_bytes.items()),
        memory_budget_bytes=budget,
        host_bytes=slower["host"],
        nvme_bytes=slower["nvme"],
        cached_bytes=cached_bytes,
        joules_per_step=step_s * devices * float(device.power_w),
        usd_per_step=None if price is None else step_s * devices * price / 3600.0,
    )


def _executed_flop(part: Part, repeats: Mapping[str, float], recomputed: float) -> float:
    """FLOP of one micro-batch through all stages, on one rank of each, in a part's blocks."""
    ledger, flop = part.ledger, 0.0
    for item in ledger.of(Matmul):
        if item.block in part.names:
            times = repeats[part.names[item.block]] * (recomputed if item.phase == "recompute" else 1.0)
            flop += _matmul_flop(ledger, item) * times
    axes = ledger.axes
    for core in ledger.of(AttentionCore):
        if core.block in part.names:
            pairs = axes[core.batch] * axes[core.heads] * axes[core.q] * axes[core.kv] * axes[core.visible]
            one = float(np.ravel(2.0 * pairs * (axes[core.qk_dim] + axes[core.v_dim]))[0]) * core.passes
            flop += one * repeats[part.names[core.block]] * (recomputed if core.phase == "recompute" else 1.0)
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
