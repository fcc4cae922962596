"""``planner explain``: where a plan's seconds and bytes go, what binds, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.job import JobOptions
from planner.cli.options import Json, flag, option, with_options
from planner.cli.plan_file import PLAN_HELP, read_plan

if TYPE_CHECKING:
    from planner.plans.plan import Plan
    from planner.specs.problem import Problem


@with_options
def explain(
    job: JobOptions,
    plan: Annotated[
        str | None, typer.Argument(help=f"{PLAN_HELP} Or name the plan with --fix.", show_default=False)
    ] = None,
    measured: Annotated[
        str | None,
        option(
            "--measured",
            metavar="TIME",
            text="A step took this long, e.g. 23.4s: what could make up the difference.",
        ),
    ] = None,
    measured_memory: Annotated[
        str | None,
        option(
            "--measured-memory",
            metavar="SIZE",
            text="A process peaked at this, e.g. 71GiB: what could make up the difference.",
        ),
    ] = None,
    everything: Annotated[bool, flag("--all", "List small items too.")] = False,
    as_json: Json = False,
) -> None:
    """Show where every second and byte of a plan goes.

    By item, technique and source; then what binds, and what a little more of it would buy. A plan from a file is priced
    again with this version, and what has changed since is said. With --measured, the terms that could explain a slower (or
    larger) run come first, in order of likelihood, with what to look at.
    """
    from planner import examine
    from planner.cli.output import print_json
    from planner.report.account import binding, byte_tree, second_tree
    from planner.report.sensitivity import sensitivities

    if plan is not None and not job.given:
        from planner.cli.serve_plan import explain_serving, read_serving_plan

        served = read_serving_plan(plan)
        if served is not None:
            explain_serving(served, everything, as_json)
            return
    measured_s, measured_bytes = _measured(measured, measured_memory)
    written, problem = subject(job, plan)
    assembly = examine(problem)
    difference = None
    if measured_s is not None or measured_bytes is not None:
        from planner.report.discrepancy import discrepancy

        difference = discrepancy(problem, assembly, measured_s, measured_bytes)
    content = {
        "schema_version": assembly.plan.schema_version,
        "plan": assembly.plan.as_dict(),
        "seconds": second_tree(assembly),
        "bytes": byte_tree(assembly),
        "binds": binding(assembly),
        "sensitivities": sensitivities(problem, assembly.plan),
        "discrepancy": difference,
        "found_by": None if written is None else written.optimality.solver,
        "changed": None if written is None else _changed(written, assembly.plan),
    }
    if as_json:
        print_json(content)
    else:
        from planner.report.explanation import show_explanation

        show_explanation(assembly.plan, content, everything)


_SMALLEST_PROCESS = 2.0**20  # bytes: less is a number that lacks its unit


def _measured(time: str | None, memory: str | None) -> tuple[float | None, float | None]:
    """Seconds and bytes that were measured; None where an option was left out.

    Raises:
        SpecError: they are no quantities above zero.
    """
    from planner.cli.values import optional_quantity, raise_if_any
    from planner.errors import Problem as Fault
    from planner.units import parse_bytes, parse_seconds

    faults: list[Fault] = []
    found = (
        optional_quantity(faults, "--measured", time, parse_seconds),
        optional_quantity(faults, "--measured-memory", memory, parse_bytes),
    )
    names, texts, parsers = ("--measured", "--measured-memory"), (time, memory), (parse_seconds, parse_bytes)
    for name, text, value, parse in zip(names, texts, found, parsers, strict=True):
        if value is not None and not value > 0.0:
            faults.append(Fault(name, repr(text), "more than 0"))
        elif value is not None and parse is parse_bytes and value < _SMALLEST_PROCESS:
            faults.append(
                Fault(
                    name, f"{text!r}: {value:g} bytes", "a process's memory, such as '71GiB'", "Give a unit."
                )
            )
    raise_if_any(faults)
    return found


def subject(
    job: JobOptions, reference: str | None, beside: Sequence[str] = ()
) -> tuple[Plan | None, Problem]:
    """The plan as written (None where flags name it) and the problem that prices it.

    Args:
        job: the options.
        reference: a stored plan, which says its whole job itself.
        beside: options (names of fields) that the command takes beside a stored plan.

    Raises:
        SpecError: there is neither a plan nor a job, or there are both.
    """
    from planner.errors import Problem as Fault
    from planner.errors import SpecError
    from planner.solve.replay import replay

    if reference is not None:
        extra = [flag for name, flag in job.flags_given().items() if name not in beside]
        if extra:
            found = f"stands beside {reference}, which says its whole job"
            hint = "Leave out the file to name the plan by options."
            raise SpecError([Fault(flag, found, "nothing", hint) for flag in extra])
        written = read_plan(reference)
        return written, replay(written)
    if not job.given:
        raise SpecError(Fault("PLAN", "is missing", "a file of plans, or a job (--model, --cluster, …)"))
    return None, job.problem()


def _changed(written: Plan, now: Plan) -> dict[str, Any] | None:
    """What another version priced otherwise; None where nothing changed."""
    pairs = {
        "step_time_s": (written.estimate.step_time_s, now.estimate.step_time_s),
        "peak_bytes": (written.estimate.memory_bytes.get("peak", 0.0), now.estimate.memory_bytes["peak"]),
    }
    changed = {
        name: {"written": before, "now": after}
        for name, (before, after) in pairs.items()
        if abs(after - before) > 1e-9 * abs(after)
    }
    return changed or None
