"""The options of ``planner train`` beside those of the job: how far to search, for how long, and what to list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from planner.cli.job import JobOptions
from planner.cli.options import flag, option
from planner.cli.values import attempt, optional_quantity, read_top
from planner.errors import Problem as Fault

if TYPE_CHECKING:
    from planner.specs.problem import Problem

__all__ = ["TrainOptions"]


@dataclass(frozen=True, eq=False)
class TrainOptions:
    """A search as the command line gives it; None means that the option was left out."""

    top: Annotated[str, option("--top", metavar="K", text="Plans to list [10].")] = "10"
    deadline: Annotated[
        str | None,
        option(
            "--deadline",
            metavar="TIME",
            text="Fewest devices that finish --tokens in time, e.g. 30d; with --layerwise, another name of --time-limit.",
        ),
    ] = None
    explore: Annotated[
        list[str] | None,
        option(
            "--explore",
            metavar="GLOB",
            text="Also try these choices, left aside as they hardly ever win, e.g. 'schedule=*' or all. Repeatable.",
        ),
    ] = None
    lengths: Annotated[
        str | None,
        option(
            "--lengths",
            metavar="LIST",
            text="Sequences of every length in a step, e.g. 4096:128,65536:4, in place of --global-batch and --seq-len: packed "
            "for the plans, and dealt to groups of unlike sizes beside them.",
        ),
    ] = None
    pareto: Annotated[
        bool,
        flag("--pareto", "Also the best plan under each of several smaller memory budgets."),
    ] = False
    layerwise: Annotated[
        bool,
        flag("--layerwise", "Also plans whose layers differ in what they recompute, shard and offload."),
    ] = False
    degrees: Annotated[
        str | None,
        option(
            "--degrees",
            metavar="OF",
            text="Also plans with tensor, context, expert and data degrees of every stage, or of every layer [plan].",
        ),
    ] = None
    stages: Annotated[
        str,
        option(
            "--stages",
            metavar="HOW",
            text="With --layerwise or unlike devices: stages of any size, or only even [uneven].",
        ),
    ] = "uneven"
    solver: Annotated[
        str,
        option(
            "--solver",
            metavar="NAME",
            text="With --layerwise, --degrees or unlike devices: auto, dp, ilp or brute [auto].",
        ),
    ] = "auto"
    time_limit: Annotated[
        str | None,
        option(
            "--time-limit",
            metavar="TIME",
            text="With --layerwise, --degrees or unlike devices [10s], or --explore [60s]: the best so far after this, with its "
            "gap; none waits for the proof.",
        ),
    ] = None
    exact: Annotated[
        bool,
        flag(
            "--exact",
            "With --layerwise: no time limit, and strategies that are the best to the last digit; not beside --time-limit.",
        ),
    ] = False

    @property
    def limit(self) -> str | None:
        """The time that a search may take, which has two names with ``--layerwise``."""
        return (self.deadline if self.layerwise else None) or self.time_limit

    def problems(self, job: JobOptions) -> tuple[list[Problem], int]:
        """A problem per cluster of the job, and how many plans to keep.

        Raises:
            SpecError: all that is wrong with the options.
        """
        faults: list[Fault] = []
        wanted = attempt(faults, read_top, self.top)
        deadline_s = self._deadline_s(faults, job)
        return job.problems(faults, deadline_s, explore=self.explore or ()), wanted or 0

    def _deadline_s(self, faults: list[Fault], job: JobOptions) -> float | None:
        """By when the run must be done; None without a deadline, or where it is one of the search (``--layerwise``)."""
        from planner.units import parse_seconds

        if self.deadline is None:
            return None
        if self.explore and not self.layerwise:
            found, hint = "is given beside --deadline", "Find the size first, then explore its plans."
            faults.append(Fault("--explore", found, "one of them", hint))
        if not self.layerwise:
            expected = "a duration such as 30d or 12h"
            return optional_quantity(faults, "--deadline", self.deadline, parse_seconds, expected)
        if job.tokens is not None:
            found, hint = "of a run (--tokens), with --layerwise", "Find the size first, then its plan."
            faults.append(Fault("--deadline", found, "one of them", hint))
        elif self.time_limit is not None:
            expected = "one of them: here it is another name"
            faults.append(Fault("--deadline", "is given beside --time-limit", expected))
        return None
