"""``planner goodput``: what failures and checkpoints leave of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.job import JobOptions
from planner.cli.options import Json, option, with_options
from planner.cli.plan_file import PLAN_HELP

if TYPE_CHECKING:
    from planner.report.goodput import Failures

_SITE = ("tokens", "usd_per_hour", "pue", "carbon")  # what a stored plan leaves open
_MAY_BE_ZERO = ("restart_s", "detect_s", "replace_s")


@dataclass(frozen=True)
class FailureOptions:
    """What fails how often, and what is done about it; None means that the option was left out."""

    mtbf: Annotated[
        str | None,
        option(
            "--mtbf",
            metavar="TIME",
            text="Mean time between failures of one device [5.8 years, Llama 3's].",
        ),
    ] = None
    restart: Annotated[
        str | None,
        option(
            "--restart",
            metavar="TIME",
            text="To start again, once it is known what failed [9 min].",
        ),
    ] = None
    detect: Annotated[
        str | None,
        option(
            "--detect",
            metavar="TIME",
            text="To notice a failure and find its cause [1 min].",
        ),
    ] = None
    replace: Annotated[
        str | None,
        option("--replace", metavar="TIME", text="Until another device is there [0: spares]."),
    ] = None
    recovery: Annotated[
        str,
        option(
            "--recovery",
            metavar="HOW",
            text="restart, elastic (with fewer replicas) or redundant (neighbours hold each other's stage) [restart].",
        ),
    ] = "restart"
    checkpoint: Annotated[
        str,
        option("--checkpoint", metavar="MODE", text="sync, async or lazy [async]."),
    ] = "async"
    store: Annotated[
        str | None,
        option(
            "--store",
            metavar="SIZE",
            text="What a device stores and loads per second [122 MB, Llama 3's].",
        ),
    ] = None
    every: Annotated[
        str | None,
        option("--every", metavar="TIME", text="Work between checkpoints [the best]."),
    ] = None

    def failures(self) -> Failures:
        """The options as values.

        Raises:
            SpecError: all that is wrong with them.
        """
        from planner.cli.values import optional_quantity, raise_if_any
        from planner.errors import Problem
        from planner.report.goodput import MODES, RECOVERIES, Failures
        from planner.units import parse_bytes, parse_seconds

        faults: list[Problem] = []
        given = {}
        for name, flag, text, parse in (
            ("device_mtbf_s", "--mtbf", self.mtbf, parse_seconds),
            ("detect_s", "--detect", self.detect, parse_seconds),
            ("replace_s", "--replace", self.replace, parse_seconds),
            ("restart_s", "--restart", self.restart, parse_seconds),
            ("store_bytes_per_s", "--store", self.store, parse_bytes),
            ("interval_s", "--every", self.every, parse_seconds),
        ):
            value = optional_quantity(faults, flag, text, parse)
            if value is None:
                continue
            given[name] = value
            if not (value > 0.0 or (name in _MAY_BE_ZERO and value == 0.0)):
                faults.append(Problem(flag, f"{value:g}", "more than 0"))
        for flag, chosen, known in (
            ("--checkpoint", self.checkpoint, MODES),
            ("--recovery", self.recovery, RECOVERIES),
        ):
            if chosen not in known:
                faults.append(Problem(flag, repr(chosen), f"one of {', '.join(known)}"))
        raise_if_any(faults)
        return Failures(mode=self.checkpoint, recovery=self.recovery, **given)


@with_options
def goodput(
    job: JobOptions,
    asked: FailureOptions,
    plan: Annotated[
        str | None, typer.Argument(help=f"{PLAN_HELP} Or name the plan with --fix.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what failures and checkpoints leave of a plan's time.

    The best interval between checkpoints, exactly and after Young and Daly; with --tokens, how long the run really takes. For
    spot instances, --mtbf is the time until one is taken away, --replace how long it takes to get another, and --usd-per-hour
    their price.
    """
    from planner import examine
    from planner.cli.explain import subject
    from planner.cli.output import print_json
    from planner.report.goodput import goodput as account
    from planner.report.goodput import others

    failures = asked.failures()
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
