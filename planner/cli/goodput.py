"""``planner goodput``: what failures and checkpoints leave of a plan."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.cli.job import JobOptions, with_job
from planner.cli.plan_file import PLAN_HELP

_SITE = ("tokens", "usd_per_hour", "pue", "carbon")  # what a stored plan leaves open
_MAY_BE_ZERO = ("restart_s", "detect_s", "replace_s")


@with_job
def goodput(
    job: JobOptions,
    plan: Annotated[
        str | None, typer.Argument(help=f"{PLAN_HELP} Or name the plan with --fix.", show_default=False)
    ] = None,
    mtbf: Annotated[
        str | None,
        typer.Option(
            "--mtbf",
            metavar="TIME",
            help="Mean time between failures of one device [5.8 years, Llama 3's].",
            show_default=False,
        ),
    ] = None,
    restart: Annotated[
        str | None,
        typer.Option(
            "--restart",
            metavar="TIME",
            help="To start again, once it is known what failed [9 min].",
            show_default=False,
        ),
    ] = None,
    detect: Annotated[
        str | None,
        typer.Option(
            "--detect",
            metavar="TIME",
            help="To notice a failure and find its cause [1 min].",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[
        str | None,
        typer.Option(
            "--replace", metavar="TIME", help="Until another device is there [0: spares].", show_default=False
        ),
    ] = None,
    recovery: Annotated[
        str,
        typer.Option(
            "--recovery",
            metavar="HOW",
            help="restart, elastic (with fewer replicas) or redundant (neighbours hold each other's stage) [restart].",
            show_default=False,
        ),
    ] = "restart",
    checkpoint: Annotated[
        str,
        typer.Option("--checkpoint", metavar="MODE", help="sync, async or lazy [async].", show_default=False),
    ] = "async",
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="SIZE",
            help="What a device stores and loads per second [122 MB, Llama 3's].",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(
            "--every", metavar="TIME", help="Work between checkpoints [the best].", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Show what failures and checkpoints leave of a plan's time.

    The best interval between checkpoints, exactly and after Young and Daly; with --tokens, how long the run really takes. For
    spot instances, --mtbf is the time until one is taken away, --replace how long it takes to get another, and --usd-per-hour
    their price.
    """
    from planner import examine
    from planner.cli.explain import subject
    from planner.cli.output import print_json
    from planner.cli.values import optional_quantity, raise_if_any
    from planner.errors import Problem
    from planner.report.goodput import MODES, RECOVERIES, Failures, others
    from planner.report.goodput import goodput as account
    from planner.units import parse_bytes, parse_seconds

    faults: list[Problem] = []
    given = {
        "device_mtbf_s": ("--mtbf", optional_quantity(faults, "--mtbf", mtbf, parse_seconds)),
        "detect_s": ("--detect", optional_quantity(faults, "--detect", detect, parse_seconds)),
        "replace_s": ("--replace", optional_quantity(faults, "--replace", replace, parse_seconds)),
        "restart_s": ("--restart", optional_quantity(faults, "--restart", restart, parse_seconds)),
        "store_bytes_per_s": ("--store", optional_quantity(faults, "--store", store, parse_bytes)),
        "interval_s": ("--every", optional_quantity(faults, "--every", every, parse_seconds)),
    }
    for name, (flag, value) in given.items():
        if value is not None and not (value > 0.0 or (name in _MAY_BE_ZERO and value == 0.0)):
            faults.append(Problem(flag, f"{value:g}", "more than 0"))
    if checkpoint not in MODES:
        faults.append(Problem("--checkpoint", repr(checkpoint), f"one of {', '.join(MODES)}"))
    if recovery not in RECOVERIES:
        faults.append(Problem("--recovery", repr(recovery), f"one of {', '.join(RECOVERIES)}"))
    raise_if_any(faults)
    failures = Failures(
        mode=checkpoint, recovery=recovery, **{k: v for k, (_, v) in given.items() if v is not None}
    )
    written, problem = subject(job, plan, beside=_SITE)
    if written is not None:
        problem = job.at_site(problem)
    assembly = examine(problem)
    content = account(assembly, failures, problem.cluster.host_link_bytes_per_s, problem)
    content["other_recoveries"] = others(assembly, failures, problem.cluster.host_link_bytes_per_s)
    if as_json:
        print_json(content)
    else:
        from planner.report.goodput import show_goodput

        show_goodput(assembly, content)
