"""Deployments that run already, in ``planner estimate --from`` and ``planner check --from``: vLLM's and SGLang's launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from planner.cli.values import (
    attempt,
    optional_number,
    optional_whole,
    parse_fixed,
    raise_if_any,
    read_cluster,
    read_model,
)
from planner.errors import Problem as Fault

if TYPE_CHECKING:
    from planner.cli.job import JobOptions
    from planner.export.serving.checking import Step
    from planner.export.serving.launched import LaunchedPool
    from planner.specs.serve_problem import ServeProblem

__all__ = ["check_served", "estimate_served", "refuse_traffic", "serves", "traffic_option"]

_TRAFFIC = {
    "isl": ("--isl", "N", "Prompt tokens, mean: for vllm and sglang."),
    "osl": ("--osl", "N", "Answer tokens, mean: for vllm and sglang."),
    "rate": ("--rate", "R", "Requests per second, for vllm and sglang [highest load]."),
    "concurrency": ("--concurrency", "C", "Requests in flight that clients keep up: for vllm and sglang."),
    "acceptance": (
        "--acceptance",
        "P",
        "Probability that a drafted token is accepted, measured: for launches that draft.",
    ),
    "ttft_ms": ("--ttft-ms", "MS", "Limit of the time to the first token: for vllm and sglang."),
    "tpot_ms": ("--tpot-ms", "MS", "Limit of the time between tokens: for vllm and sglang."),
}


def traffic_option(name: str) -> Any:
    """The option for a part of what a deployment has to answer."""
    flag, metavar, text = _TRAFFIC[name]
    return typer.Option(flag, help=text, metavar=metavar, show_default=False)


def refuse_traffic(launcher: str | None, traffic: dict[str, str | None]) -> None:
    """Raises SpecError where a job that trains is given traffic."""
    of = "a job that trains" if launcher is None else f"--from {launcher}, which trains"
    given = [flag for name, (flag, _, _) in _TRAFFIC.items() if traffic[name] is not None]
    raise_if_any([Fault(flag, f"beside {of}", "--from vllm or sglang") for flag in given])


def serves(launcher: str) -> bool:
    """Whether a launcher of ``--from`` is an engine that serves."""
    return launcher in ("vllm", "sglang")


def served_problem(
    job: JobOptions, launcher: str, paths: str, traffic: dict[str, str | None]
) -> tuple[ServeProblem, tuple[LaunchedPool, ...]]:
    """The problem that a launch describes, completed by the options.

    Raises:
        SpecError: what is wrong with the file or the options, or missing from both, all at once.
    """
    from planner.export.serving.readers import problem_of_launch, read_launch
    from planner.specs.traffic import Traffic

    pools = read_launch(launcher, paths)
    faults: list[Fault] = []
    numbers: dict[str, Any] = {}
    for name in ("isl", "osl"):
        if traffic[name] is None:
            faults.append(
                Fault(
                    f"--{name}", "is missing", "tokens, such as 4000: a launch does not say what it is asked"
                )
            )
        numbers[name] = optional_whole(faults, f"--{name}", traffic[name])
    numbers["rate_per_s"] = optional_number(faults, "--rate", traffic["rate"])
    numbers["concurrency"] = optional_whole(faults, "--concurrency", traffic["concurrency"])
    for name in ("ttft", "tpot"):
        limit = optional_number(faults, f"--{name}-ms", traffic[f"{name}_ms"])
        numbers[f"{name}_s"] = None if limit is None else limit * 1e-3
    acceptance = optional_number(faults, "--acceptance", traffic["acceptance"])
    if acceptance is not None and not 0.0 <= acceptance <= 1.0:
        faults.append(Fault("--acceptance", repr(acceptance), "a probability from 0 to 1"))
    named = job.model or pools[0].model
    model = attempt(faults, read_model, named or None, flags={"model": "--model"})
    machines = None
    if not job.cluster:
        faults.append(Fault("--cluster", "is missing", "a cluster, such as h100-sxm:1x8"))
    else:
        machines = attempt(faults, read_cluster, job.cluster[0], flags={"cluster": "--cluster"})
    usd = optional_number(faults, "--usd-per-hour", job.usd_per_hour)
    asked = None
    if None not in (numbers["isl"], numbers["osl"]):
        flags = {"isl": "--isl", "osl": "--osl", "rate_per_s": "--rate", "concurrency": "--concurrency"}
        flags |= {"ttft_s": "--ttft-ms", "tpot_s": "--tpot-ms"}
        asked = attempt(faults, Traffic, flags=flags, **numbers)
    given = attempt(faults, parse_fixed, job.fix or [])
    raise_if_any(faults)
    assert model is not None
    assert machines is not None
    assert asked is not None
    problem = problem_of_launch(pools, model, machines, asked, usd, acceptance)
    if given:
        from dataclasses import replace

        problem = replace(problem, fixed={**problem.fixed, **given})
    return problem, pools


def estimate_served(
    job: JobOptions, source: tuple[str, str], traffic: dict[str, str | None], out: str | None, as_json: bool
) -> None:
    """Prices a launch, lists what was not understood in it, and names the best plan for the same traffic."""
    from contextlib import nullcontext

    from planner.cli.output import OutputFile, json_text, print_json
    from planner.export.serving.checking import best_of_engine
    from planner.plan import SCHEMA_VERSION
    from planner.serving.serve import serve

    problem, pools = served_problem(job, *source, traffic)
    with OutputFile(out) if out is not None else nullcontext() as file:
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
        from planner.report.served import show_launch

        show_launch(plan, best, notes)


def check_served(
    job: JobOptions, source: tuple[str, str], traffic: dict[str, str | None], as_json: bool
) -> bool:
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
        from planner.report.served import show_served_check

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
