"""Is a deployment right, and is it any good: what its engine refuses, what it wastes, and what the best plan would gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import ExportError, Infeasible, InvalidPlan, SpecError
from planner.export.checking import Finding
from planner.export.serving import find_serving_exporter, serving_problems
from planner.export.serving.launched import LaunchedPool
from planner.export.serving.rules import SERVING_LAUNCHERS
from planner.export.serving.target import ServingTarget
from planner.export.steps import way
from planner.serving.plan import Pool, ServePlan
from planner.serving.serve import serve
from planner.specs.serve_problem import ServeProblem

__all__ = ["Step", "best_of_engine", "serving_findings", "steps_to"]

_GROUPS = (
    ("tp", "dp", "pp", "ep", "etp", "replicas", "experts"),
    ("chunk_tokens",),
    ("max_sequences",),
    ("draft_tokens",),
)
_UNUSED = (
    1.25  # of the sequences that the engine is allowed: caches hold that many more before it is worth a word
)
_CANDIDATES = 20


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the way to the best plan: knobs (name → (was, is)), and output tokens per second and device around it."""

    knobs: Mapping[str, tuple[Any, Any]]
    before_tokens_per_s: float
    after_tokens_per_s: float


def serving_findings(
    problem: ServeProblem, pools: Sequence[LaunchedPool]
) -> tuple[list[Finding], ServePlan | None]:
    """What is wrong or wasteful, errors first, and the plan; None where it cannot be priced."""
    found = [Finding("error", what, layer) for pool in pools for what, layer in pool.errors]
    asked = problem.traffic.isl + problem.traffic.osl
    for pool in pools:
        if pool.context_tokens is not None and pool.context_tokens < asked:
            what = f"contexts of {pool.context_tokens:,} tokens at most, {asked:,} are asked for"
            found.append(Finding("error", what, "the server, at every such request (400)"))
    try:
        plan = serve(problem, top=1).best
    except (Infeasible, InvalidPlan, SpecError) as error:
        found += [Finding("error", str(fault), _caught(str(fault))) for fault in error.problems]
        return found, None
    target = ServingTarget(plan)
    try:
        refused = serving_problems(target, find_serving_exporter(pools[0].launcher))
    except ExportError as error:
        refused = list(error.problems)
    for fault in refused:
        expected = f"; expected {fault.expected}" if fault.expected else ""
        found.append(Finding("error", f"{fault.found}{expected}", "the engine, at the start"))
    found += [Finding("warning", sentence) for pool in pools for sentence in pool.wasteful]
    return [*found, *_idle(target, pools)], plan


def _caught(text: str) -> str:
    return "the engine, when it sizes its caches" if text.startswith("device memory") else ""


def _idle(target: ServingTarget, pools: Sequence[LaunchedPool]) -> Iterator[Finding]:
    """Caches that the limit on sequences leaves empty."""
    allowed, pool = pools[-1].fixed.get("max_sequences"), target.plan.pools[-1]
    if allowed is None or target.plan.estimate.binding not in ("memory", "sequences"):
        return
    most = allowed * pool.mesh["dp"] * pool.mesh["pp"]
    held = int(target.capacity(pool).sequences[0])
    if held > _UNUSED * most:
        yield Finding(
            "warning", f"at most {most:,} sequences per replica are let in; its caches hold {held:,}"
        )


def best_of_engine(problem: ServeProblem, launcher: str) -> ServePlan | None:
    """The best plan for the same weights, caches and traffic that the same engine runs; None where there is none."""
    kept = {name: value for name, value in problem.fixed.items() if name in ("weights", "cache")}
    modes = ("aggregated", "disaggregated")
    free = replace(problem, fixed=kept, modes=modes, launcher=SERVING_LAUNCHERS[launcher])
    exporter = find_serving_exporter(launcher)
    try:
        plans = serve(free, top=_CANDIDATES).plans
    except (Infeasible, InvalidPlan, SpecError):
        return None
    for plan in plans:
        try:
            if not serving_problems(ServingTarget(plan), exporter):
                return plan
        except ExportError:
            continue
    return None


def steps_to(problem: ServeProblem, plan: ServePlan, best: ServePlan) -> list[Step]:
    """Steps from a plan to the best one, the most helpful choice first; to two pools from one, or back, it is a single step."""
    if plan.mode != best.mode or plan.mode == "disaggregated":
        pools = tuple(" | ".join(_text(pool) for pool in p.pools) for p in (plan, best))
        return (
            [Step({"pools": (pools[0], pools[1])}, _rate(plan), _rate(best))] if pools[0] != pools[1] else []
        )
    current, goal = _choices(plan), _choices(best)
    if not any(block.moe for block in problem.model.blocks.values()):
        for choices in (current, goal):
            choices |= {"ep": None, "etp": None}  # a dense model has no such degrees, whatever its mesh says
    groups = [group for group in _GROUPS if any(current.get(name) != goal.get(name) for name in group)]

    def price(choices: Mapping[str, Any]) -> tuple[float, bool] | None:
        fixed = {**problem.fixed, **{name: value for name, value in choices.items() if value is not None}}
        try:
            return 1.0 / _rate(serve(replace(problem, fixed=fixed), top=1).best), True
        except (Infeasible, InvalidPlan, SpecError):
            return None

    found = way(current, goal, groups, price, (1.0 / _rate(plan), True), (1.0 / _rate(best), True))
    return [Step(step.knobs, 1.0 / step.before, 1.0 / step.after) for step in found]


def _rate(plan: ServePlan) -> float:
    return plan.estimate.output_tokens_per_s_per_device


def _choices(plan: ServePlan) -> dict[str, Any]:
    """A plan's choices of one pool, as ``ServeProblem.fixed`` names them."""
    pool = plan.pools[0]
    found = {**pool.mesh, "replicas": pool.replicas, "experts": pool.knobs["experts"]}
    found["draft_tokens"] = int(pool.knobs.get("draft_tokens", 0))
    found["chunk_tokens"] = pool.knobs.get("chunk_tokens")
    cap = pool.knobs.get("max_sequences")
    found["max_sequences"] = None if cap is None else -(-int(cap) // (pool.mesh["dp"] * pool.mesh["pp"]))
    return found


def _text(pool: Pool) -> str:
    """A pool's role, replicas, degrees and budget."""
    degrees = [f"{name} {pool.mesh[name]}" for name in ("tp", "pp", "dp", "ep") if pool.mesh[name] > 1]
    budget = [f"budget {pool.knobs['chunk_tokens']}"] if "chunk_tokens" in pool.knobs else []
    return " ".join([f"{pool.role} {pool.replicas} x", *(degrees or ["1 device"]), *budget])
