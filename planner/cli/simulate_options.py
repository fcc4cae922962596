"""The options of ``planner simulate``: the load, read beside what the plan says of its own, and the requests that it makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from planner.cli.options import option
from planner.cli.values import attempt, optional_number, optional_whole, raise_if_any
from planner.errors import Problem as Fault
from planner.errors import SpecError

if TYPE_CHECKING:
    from planner.load.requests import Lengths, Requests
    from planner.serving.plan import ServePlan

__all__ = ["Load", "SimulateOptions"]

_REQUESTS = 20_000
_ROUTINGS = ("random", "turn")
_FLAGS = {
    "prompt_tokens": "--isl",
    "output_tokens": "--osl",
    "prompt_cv2": "--isl-scv",
    "output_cv2": "--osl-scv",
    "prefix_hit": "--prefix-hit",
    "requests": "--requests",
    "rate": "--rate",
    "arrival_cv2": "--arrival-scv",
    "scheduler": "--scheduler",
}


@dataclass(frozen=True)
class SimulateOptions:
    """A load and how it is scheduled, as the command line gives it; None means that the option was left out."""

    trace: Annotated[
        str | None,
        option(
            "--trace",
            text="CSV with arrival_s, prompt_tokens, output_tokens and perhaps priority.",
            metavar="F",
        ),
    ] = None
    rate: Annotated[str | None, option("--rate", text="Requests per second [the plan's].", metavar="R")] = (
        None
    )
    concurrency: Annotated[
        str | None,
        option("--concurrency", text="Requests in flight at all times, instead of a rate.", metavar="C"),
    ] = None
    isl: Annotated[str | None, option("--isl", text="Prompt tokens, mean [the plan's].", metavar="N")] = None
    osl: Annotated[str | None, option("--osl", text="Answer tokens, mean [the plan's].", metavar="N")] = None
    isl_scv: Annotated[
        str | None, option("--isl-scv", text="Squared variation of prompts' lengths [0].", metavar="X")
    ] = None
    osl_scv: Annotated[
        str | None,
        option("--osl-scv", text="Squared variation of answers' lengths [the plan's].", metavar="X"),
    ] = None
    arrival_scv: Annotated[
        str | None,
        option(
            "--arrival-scv",
            text="Squared variation of gaps between arrivals: 1 Poisson, more bursty [1].",
            metavar="X",
        ),
    ] = None
    prefix_hit: Annotated[
        str | None,
        option("--prefix-hit", text="Fraction of prompt tokens that are cached [the plan's].", metavar="X"),
    ] = None
    requests: Annotated[str | None, option("--requests", text="How many [20000].", metavar="N")] = None
    seed: Annotated[str, option("--seed", text="Of the random requests [0].", metavar="N")] = "0"
    policy: Annotated[
        str | None,
        option("--scheduler", text="static, orca, vllm or sarathi [the plan's: sarathi].", metavar="NAME"),
    ] = None
    routing: Annotated[
        str,
        option("--routing", text="Requests to replicas: random, or in turn [random].", metavar="random|turn"),
    ] = "random"

    def load(self) -> Load:
        """The options as values.

        Raises:
            SpecError: all that is wrong with them.
        """
        from planner.load.scheduler import scheduler

        faults: list[Fault] = []
        found = Load(
            self.trace,
            optional_number(faults, "--rate", self.rate),
            _whole(faults, "--concurrency", self.concurrency, 1),
            _whole(faults, "--requests", self.requests, 1) or _REQUESTS,
            _whole(faults, "--seed", self.seed, 0) or 0,
            optional_number(faults, "--isl", self.isl),
            optional_number(faults, "--osl", self.osl),
            optional_number(faults, "--isl-scv", self.isl_scv),
            optional_number(faults, "--osl-scv", self.osl_scv),
            optional_number(faults, "--arrival-scv", self.arrival_scv),
            optional_number(faults, "--prefix-hit", self.prefix_hit),
        )
        loads = (("--trace", self.trace), ("--rate", self.rate), ("--concurrency", self.concurrency))
        given = [flag for flag, text in loads if text]
        if len(given) > 1:
            faults.append(Fault(given[0], f"is given beside {', '.join(given[1:])}", "one of them"))
        if self.routing not in _ROUTINGS:
            faults.append(Fault("--routing", repr(self.routing[:40]), " or ".join(_ROUTINGS)))
        if self.policy is not None:
            attempt(faults, scheduler, self.policy, flags=_FLAGS)
        raise_if_any(faults)
        return found


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment; None where neither an option nor, after :meth:`beside`, the plan says it.

    Attributes:
        trace: a file of requests, in place of all else but ``prefix_hit``.
        rate_per_s, clients: requests per second, or requests in flight.
        requests, seed: how many are drawn, and of which random numbers.
        isl, osl: tokens, mean.
        isl_scv, osl_scv, arrival_scv: squared variation of lengths and of gaps between arrivals.
        prefix_hit: fraction of prompt tokens that are cached.
    """

    trace: str | None
    rate_per_s: float | None
    clients: int | None
    requests: int
    seed: int
    isl: float | None
    osl: float | None
    isl_scv: float | None
    osl_scv: float | None
    arrival_scv: float | None
    prefix_hit: float | None

    def beside(self, plan: ServePlan | None) -> Load:
        """The load with what the plan was made for where the options leave it open.

        Raises:
            SpecError: neither says how much is asked.
        """
        traffic = {} if plan is None else plan.traffic
        own = {"isl": "isl", "osl": "osl", "osl_scv": "length_scv", "prefix_hit": "prefix_hit"}
        left: dict[str, Any] = {n: traffic.get(own[n]) for n in own if getattr(self, n) is None}
        found = replace(self, **left)
        if self.trace is not None or self.clients is not None or self.rate_per_s is not None:
            return found
        if plan is None:
            expected = "requests per second, a --concurrency or a --trace"
            raise SpecError(Fault("--rate", "is missing", expected))
        clients = traffic.get("concurrency")
        if plan.mode == "offloaded":
            clients = plan.estimate.max_concurrency  # as many as keep every block full
        if clients is not None:
            return replace(found, clients=clients)
        return replace(found, rate_per_s=plan.estimate.goodput_requests_per_s)

    def drawn(self) -> Requests:
        """The requests of the trace, or drawn at random.

        Raises:
            SpecError: lengths are missing, or a value is out of range.
        """
        from planner.load.requests import Lengths, draw, read_trace

        if self.trace is not None:
            found = read_trace(self.trace)
            return found.cached(float(self.prefix_hit)) if self.prefix_hit else found
        faults = [
            Fault(flag, "is missing", "tokens, mean")
            for flag, tokens in (("--isl", self.isl), ("--osl", self.osl))
            if tokens is None
        ]
        raise_if_any(faults)
        lengths: Lengths | None = attempt(
            faults, Lengths, self.isl, self.osl, self.isl_scv or 0.0, self.osl_scv or 0.0, self.prefix_hit or 0.0,
            flags=_FLAGS,
        )  # fmt: skip
        raise_if_any(faults)
        rate_per_s = None if self.clients is not None else self.rate_per_s
        variation = 1.0 if self.arrival_scv is None else self.arrival_scv
        asked: Requests | None = attempt(
            faults, draw, lengths, self.requests, rate_per_s=rate_per_s, arrival_cv2=variation, seed=self.seed,
            flags=_FLAGS,
        )  # fmt: skip
        raise_if_any(faults)
        assert asked is not None
        return asked


def _whole(faults: list[Fault], flag: str, text: str | None, least: int) -> int | None:
    """A whole number from ``least`` where the option is given; a fault is noted."""
    number = optional_whole(faults, flag, text)
    if number is not None and number < least:
        faults.append(Fault(flag, str(number), f"a whole number from {least}"))
    return number
