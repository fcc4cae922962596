"""``planner check``: whether a configuration that is in use is right, and how much better it could be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.job import JobOptions
from planner.cli.launched import best_of_launcher, launched_problem
from planner.cli.launched_serving import check_served, serves
from planner.cli.options import Json, with_options
from planner.cli.traffic_options import TrafficOptions

if TYPE_CHECKING:
    from planner.export.checking import Change

_WRONG = 1


@with_options
def check(
    job: JobOptions,
    source: Annotated[
        tuple[str, str],
        typer.Option(
            "--from",
            metavar="LAUNCHER FILE",
            help="The configuration: megatron, deepspeed, accelerate, transformers, torchtitan, galvatron, vllm or sglang.",
        ),
    ],
    traffic: TrafficOptions,
    as_json: Json = False,
) -> None:
    """Say what is wrong or wasteful in a launcher's configuration.

    Rules are stricter than the launcher's own, and each broken one says at which layer the launcher would have caught it.
    Then what the best plan for the same job would gain, knob by knob. Exits 1 where something is wrong. Of a pair of vllm's or
    sglang's pools, the files have a comma between them: prefill first; --isl and what follows it say what they have to answer.
    """
    from planner.cli.output import print_json
    from planner.export.checking import findings, path_to

    if serves(source[0]):
        if check_served(job, source, traffic, as_json):
            raise typer.Exit(_WRONG)
        return
    traffic.refuse(source[0])
    problem, run = launched_problem(job, *source)
    found, plan = findings(problem, run)
    best = best_of_launcher(problem, run.launcher)
    steps = path_to(problem, plan, best) if plan is not None and best is not None else []
    if as_json:
        print_json(
            {
                "findings": [{"level": f.level, "what": f.what, "caught_by": f.caught_by} for f in found],
                "notes": list(run.notes),
                "plan": None if plan is None else plan.as_dict(),
                "best": None if best is None else best.as_dict(),
                "steps": [_fields(step) for step in steps],
            }
        )
    else:
        from planner.report.checked import show_check

        show_check(problem, run, found, plan, best, steps)
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(_WRONG)


def _fields(step: Change) -> dict[str, Any]:
    knobs = {name: {"was": was, "is": now} for name, (was, now) in step.knobs.items()}
    return {"knobs": knobs, "before_s": step.before_s, "after_s": step.after_s, "fits": step.fits}
