"""``planner simulate``: requests, one by one, through the engines of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.plan_file import PLAN_HELP
from planner.cli.values import attempt, optional_number, optional_whole, raise_if_any
from planner.errors import Problem as Fault
from planner.errors import SpecError

if TYPE_CHECKING:
    from planner.load.requests import Lengths, Requests
    from planner.serving.deployment import Deployment
    from planner.serving.plan import ServePlan

__all__ = ["simulate"]

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


def _option(*names: str, text: str, metavar: str = "X") -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def simulate(
    plan: Annotated[
        str,
        typer.Argument(
            help=f"A serving plan: {PLAN_HELP} Or a .toml with an [iteration] time.", show_default=False
        ),
    ],
    trace: Annotated[
        str | None,
        _option(
            "--trace",
            text="CSV with arrival_s, prompt_tokens, output_tokens and perhaps priority.",
            metavar="F",
        ),
    ] = None,
    rate: Annotated[
        str | None, _option("--rate", text="Requests per second [the plan's].", metavar="R")
    ] = None,
    concurrency: Annotated[
        str | None,
        _option("--concurrency", text="Requests in flight at all times, instead of a rate.", metavar="C"),
    ] = None,
    isl: Annotated[
        str | None, _option("--isl", text="Prompt tokens, mean [the plan's].", metavar="N")
    ] = None,
    osl: Annotated[
        str | None, _option("--osl", text="Answer tokens, mean [the plan's].", metavar="N")
    ] = None,
    isl_scv: Annotated[
        str | None, _option("--isl-scv", text="Squared variation of prompts' lengths [0].")
    ] = None,
    osl_scv: Annotated[
        str | None, _option("--osl-scv", text="Squared variation of answers' lengths [the plan's].")
    ] = None,
    arrival_scv: Annotated[
        str | None,
        _option(
            "--arrival-scv", text="Squared variation of gaps between arrivals: 1 Poisson, more bursty [1]."
        ),
    ] = None,
    prefix_hit: Annotated[
        str | None, _option("--prefix-hit", text="Fraction of prompt tokens that are cached [the plan's].")
    ] = None,
    requests: Annotated[str | None, _option("--requests", text="How many [20000].", metavar="N")] = None,
    seed: Annotated[str, _option("--seed", text="Of the random requests [0].", metavar="N")] = "0",
    policy: Annotated[
        str | None,
        _option("--scheduler", text="static, orca, vllm or sarathi [the plan's: sarathi].", metavar="NAME"),
    ] = None,
    routing: Annotated[
        str,
        _option(
            "--routing", text="Requests to replicas: random, or in turn [random].", metavar="random|turn"
        ),
    ] = "random",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Simulate a serving plan under a trace of requests, a rate, or a number of clients.

    Every request and every iteration; percentiles come with the error that a finite run leaves.
    """
    from planner.cli.output import print_json
    from planner.plan import SCHEMA_VERSION

    faults: list[Fault] = []
    numbers = {
        name: optional_number(faults, flag, text)
        for name, flag, text in (
            ("rate", "--rate", rate), ("isl", "--isl", isl), ("osl", "--osl", osl), ("isl_scv", "--isl-scv", isl_scv),
            ("osl_scv", "--osl-scv", osl_scv), ("arrival_scv", "--arrival-scv", arrival_scv),
            ("prefix_hit", "--prefix-hit", prefix_hit),
        )
    }  # fmt: skip
    count, clients, start = (
        optional_whole(faults, flag, text)
        for flag, text in (("--requests", requests), ("--concurrency", concurrency), ("--seed", seed))
    )
    least = (("--requests", count, 1), ("--concurrency", clients, 1), ("--seed", start, 0))
    faults += [
        Fault(flag, str(number), f"a whole number from {low}")
        for flag, number, low in least
        if number is not None and number < low
    ]
    given = [
        flag for flag, text in (("--trace", trace), ("--rate", rate), ("--concurrency", concurrency)) if text
    ]
    if len(given) > 1:
        faults.append(Fault(given[0], f"is given beside {', '.join(given[1:])}", "one of them"))
    if routing not in ("random", "turn"):
        faults.append(Fault("--routing", repr(routing[:40]), "random or turn"))
    raise_if_any(faults)

    chosen, deployment = _deployment(plan, policy, routing)
    if trace is None and clients is None and numbers["rate"] is None:
        clients = None if chosen is None else _clients(chosen)
        numbers["rate"] = (
            None if chosen is None or clients is not None else chosen.estimate.goodput_requests_per_s
        )
        if clients is None and numbers["rate"] is None:
            raise SpecError(
                Fault("--rate", "is missing", "requests per second, a --concurrency or a --trace")
            )
    asked = _requests(chosen, trace, numbers, clients, 20_000 if count is None else count, start or 0)
    summary = _simulated(deployment, asked, clients, whole=trace is not None, enabled=not as_json)
    content = {
        "schema_version": SCHEMA_VERSION,
        "plan": None if chosen is None else chosen.id,
        "load": {"trace": trace, "rate_per_s": numbers["rate"], "concurrency": clients, "seed": start},
        "simulated": summary,
        "predicted": None if chosen is None else _predicted(chosen),
    }
    if as_json:
        print_json(content)
    else:
        from planner.report.simulation import show_simulation

        show_simulation(content)


def _deployment(reference: str, policy: str | None, routing: str) -> tuple[ServePlan | None, Deployment]:
    from planner.cli.serve_plan import read_serving_plan
    from planner.load.scheduler import scheduler
    from planner.serving.deployment import deployment_of, read_pool

    faults: list[Fault] = []
    if policy is not None:
        attempt(faults, scheduler, policy, flags=_FLAGS)
    raise_if_any(faults)
    if reference.endswith(".toml"):
        return None, read_pool(reference, policy)
    plan = read_serving_plan(reference)
    if plan is None:
        raise SpecError(Fault(reference, "is a training plan", "a serving plan", "planner serve makes them."))
    return plan, deployment_of(plan, policy, routing)


def _clients(plan: ServePlan) -> int | None:
    """Clients of a plan for a number of them; of one that answers a block at a time, as many as keep every block full."""
    asked = plan.traffic.get("concurrency")
    return (
        plan.estimate.max_concurrency if plan.mode == "offloaded" else None if asked is None else int(asked)
    )


def _requests(
    plan: ServePlan | None,
    trace: str | None,
    numbers: dict[str, float | None],
    clients: int | None,
    count: int,
    seed: int,
) -> Requests:
    """From the trace, or drawn with what is given, and for the rest with the plan's traffic."""
    from planner.load.requests import Lengths, draw, read_trace

    traffic = {} if plan is None else plan.traffic

    def known(name: str, field: str, default: float | None) -> Any:
        own = numbers[name]
        return traffic.get(field, default) if own is None else own

    if trace is not None:
        found = read_trace(trace)
        hit = known("prefix_hit", "prefix_hit", 0.0)
        return found.cached(float(hit)) if hit else found
    faults: list[Fault] = []
    faults += [
        Fault(flag, "is missing", "tokens, mean")
        for flag, name in (("--isl", "isl"), ("--osl", "osl"))
        if known(name, name, None) is None
    ]
    raise_if_any(faults)
    lengths: Lengths | None = attempt(
        faults,
        Lengths,
        known("isl", "isl", None),
        known("osl", "osl", None),
        known("isl_scv", "", 0.0),
        known("osl_scv", "length_scv", 0.0),
        known("prefix_hit", "prefix_hit", 0.0),
        flags=_FLAGS,
    )
    raise_if_any(faults)
    gaps = numbers["arrival_scv"]
    rate = None if clients is not None else numbers["rate"]
    asked: Requests | None = attempt(
        faults,
        draw,
        lengths,
        count,
        rate_per_s=rate,
        arrival_cv2=1.0 if gaps is None else gaps,
        seed=seed,
        flags=_FLAGS,
    )
    raise_if_any(faults)
    assert asked is not None
    return asked


def _simulated(
    deployment: Deployment, asked: Requests, clients: int | None, *, whole: bool, enabled: bool
) -> dict[str, Any]:
    from planner.cli.progress import Progress
    from planner.load.results import settling, summarize
    from planner.serving.deployment import run

    with Progress(enabled, "simulating") as progress:
        done = run(deployment, asked, concurrency=clients, on_progress=progress)
    return summarize(done, 0.0 if whole else settling(done)).as_dict()


def _predicted(plan: ServePlan) -> dict[str, Any]:
    """What the plan says of itself, at the load that it was made for."""
    estimate = plan.estimate
    return {
        "ttft_s": dict(estimate.ttft_s),
        "tpot_s": dict(estimate.tpot_s),
        "e2e_s": dict(estimate.e2e_s),
        "requests_per_s": estimate.goodput_requests_per_s,
    }
