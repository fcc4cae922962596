"""``planner techniques``: the catalogue."""

from __future__ import annotations

from typing import Annotated

from planner.cli.options import Json, flag, option


def techniques(
    job: Annotated[
        str | None,
        option("--job", metavar="JOB", text="training or serving; both if left out."),
    ] = None,
    everything: Annotated[bool, flag("--all", "Also say why the others are not modelled.")] = False,
    as_json: Json = False,
) -> None:
    """List the techniques, and the choices of --fix that they serve.

    Those that are known and not modelled are named as well.
    """
    from planner.cli.output import print_json
    from planner.errors import Problem, SpecError, did_you_mean
    from planner.technique import catalogue

    jobs = ("training", "serving")
    if job is not None and job not in jobs:
        raise SpecError(Problem("--job", repr(job[:40]), " or ".join(jobs), did_you_mean(job, jobs)))
    found = [t for t in catalogue().values() if job in (None, t.job)]
    if as_json:
        print_json([technique.as_dict() for technique in found])
    else:
        from planner.report.catalogue import show_techniques

        show_techniques(found, everything)
