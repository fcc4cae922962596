"""Deployments that run already, in ``planner estimate --from`` and ``planner check --from``: vLLM's and SGLang's launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner.cli.values import (
    attempt,
    optional_number,
    parse_fixed,
    raise_if_any,
    read_cluster,
    read_model,
)
from planner.errors import Problem as Fault

if TYPE_CHECKING:
    from planner.cli.job import JobOptions
    from planner.cli.traffic_options import TrafficOptions
    from planner.export.serving.checking import Step
    from planner.export.serving.launched import LaunchedPool
    from planner.specs.serve_problem import ServeProblem

__all__ = ["check_served", "estimate_served", "serves"]


def serves(launcher: str) -> bool:
    """Whether a launcher of ``--from`` is an engine that serves."""
    return launcher in ("vllm", "sglang")


def served_problem(
    job: JobOptions, launcher: str, paths: str, traffic: TrafficOptions
) -> tuple[ServeProblem, tuple[LaunchedPool, ...]]:
    """The problem that a launch describes, completed by the options.

    Raises:
        SpecError: what is wrong with the file or the options, or missing from both, all at once.
    """
    from planner.export.serving.readers import problem_of_launch, read_launch

    pools = read_launch(launcher, paths)
    faults: list[Fault] = []
    asked, acceptance = traffic.read(faults), traffic.read_acceptance(faults)
    named = job.model or pools[0].model
    model = attempt(faults, read_model, named or None, flags={"model": "--model"})
    machines = None
    if not job.cluster:
        faults.append(Fault("--cluster", "is missing", "a cluster, such as h100-sxm:1x8"))
    else:
        machines = attempt(faults, read_cluster, job.cluster[0], flags={"cluster": "--cluster"})
    usd = optional_number(faults, "--usd-per-hour", job.usd_per_hour)
    given = attempt(faults, parse_fixed, job.fix or [])
    raise_if_any(faults)
    assert model is not None
    assert machines is not None
    assert asked is not None
    problem = problem_of_launch(pools, model, machines, asked, usd, acceptance)
    if given:
        problem = replace(problem, fixed={**problem.fixed, **given})
    return problem, pools


def estimate_served(
    job: JobOptions, source: tuple[str, str], traffic: TrafficOptions, out: str | None, as_json: bool
) -> None:
    """Prices a launch, lists what was not understood in it, and names the best plan for the same traffic."""
    from planner.cli.output import json_text, plans_file, print_json
    from planner.export.serving.checking import best_of_engine
    from planner.plans.plan import SCHEMA_VERSION
    from planner.serving.serve import serve

    problem, pools = served_problem(job, *source, traffic)
    with plans_file(out) as file:
        plan = serve(problem, top=1).best
        best = best_of_engine(problem, source[0])
        notes = _notes(pools)
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "plans": [plan.as_dict()],
            "notes": notes,
        }
        if best is not None:
            gain = best.estimate.output_tokens_per_s_per_device / plan.estimate.output_tokens_per_s_per_device
            content["best"] = {"plan": best.as_dict(), "speedup": gain}
        if file is not None:
            file.write(json_text(content) + "\n")
    if as_json:
        print_json(content)
    else:
        from planner.report.launched_serving import show_launch

        show_launch(plan, best, notes)


def check_served(job: JobOptions, source: tuple[str, str], traffic: TrafficOptions, as_json: bool) -> bool:
    """Says what is wrong or wasteful in a launch, and what the best plan would gain; True where something is wrong."""
    from planner.cli.output import print_json
    from planner.export.serving.checking import best_of_engine, serving_findings, steps_to

    problem, pools = served_problem(job, *source, traffic)
    found, plan = serving_findings(problem, pools)
    best = best_of_engine(problem, source[0])
    steps = steps_to(problem, plan, best) if plan is not None and best is not None else []
    notes = _notes(pools)
    if as_json:
        print_json(
            {
                "findings": [{"level": f.level, "what": f.what, "caught_by": f.caught_by} for f in found],
                "notes": notes,
                "plan": None if plan is None else plan.as_dict(),
                "best": None if best is None else best.as_dict(),
                "steps": [_fields(step) for step in steps],
            }
        )
    else:
        from planner.report.launched_serving import show_served_check

        show_served_check(source[0], problem, found, notes, plan, best, steps)
    return any(finding.level == "error" for finding in found)


def _notes(pools: Sequence[LaunchedPool]) -> list[str]:
    if len(pools) == 1:
        return [*pools[0].notes]
    return [f"{pool.role}: {note}" for pool in pools for note in pool.notes]


def _fields(step: Step) -> dict[str, Any]:
    knobs = {name: {"was": was, "is": now} for name, (was, now) in step.knobs.items()}
    return {
        "knobs": knobs,
        "before_tokens_per_s_per_device": step.before_tokens_per_s,
        "after_tokens_per_s_per_device": step.after_tokens_per_s,
    }
