"""``planner simulate``: requests, one by one, through the engines of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Json, with_options
from planner.cli.plan_file import PLAN_HELP
from planner.cli.simulate_options import Load, SimulateOptions
from planner.errors import Problem, SpecError

if TYPE_CHECKING:
    from planner.serving.deployment import Deployment
    from planner.serving.plan import ServePlan

__all__ = ["simulate"]


@with_options
def simulate(
    plan: Annotated[
        str,
        typer.Argument(
            help=f"A serving plan: {PLAN_HELP} Or a .toml with an [iteration] time.", show_default=False
        ),
    ],
    asked: SimulateOptions,
    as_json: Json = False,
) -> None:
    """Simulate a serving plan under a trace of requests, a rate, or a number of clients.

    Every request and every iteration; percentiles come with the error that a finite run leaves.
    """
    from planner.cli.output import print_json
    from planner.plans.plan import SCHEMA_VERSION

    load = asked.load()
    chosen, deployment = _deployment(plan, asked)
    load = load.beside(chosen)
    summary = _simulated(deployment, load, enabled=not as_json)
    content = {
        "schema_version": SCHEMA_VERSION,
        "plan": None if chosen is None else chosen.id,
        "load": {
            "trace": load.trace, "rate_per_s": load.rate_per_s, "concurrency": load.clients, "seed": load.seed,
        },
        "pools": len(deployment.stages),
        "simulated": summary,
        "predicted": None if chosen is None else _predicted(chosen),
    }  # fmt: skip
    if as_json:
        print_json(content)
    else:
        from planner.report.simulation import show_simulation

        show_simulation(content)


def _deployment(reference: str, asked: SimulateOptions) -> tuple[ServePlan | None, Deployment]:
    """The plan that is named, and its engines; no plan of a pool's file."""
    from planner.cli.serve_plan import read_serving_plan
    from planner.serving.deployment import deployment_of
    from planner.serving.pool_file import read_pool

    if reference.endswith(".toml"):
        return None, read_pool(reference, asked.policy)
    plan = read_serving_plan(reference)
    if plan is None:
        raise SpecError(
            Problem(reference, "is a training plan", "a serving plan", "planner serve makes them.")
        )
    return plan, deployment_of(plan, asked.policy, asked.routing)


def _simulated(deployment: Deployment, load: Load, *, enabled: bool) -> dict[str, Any]:
    from planner.cli.progress import Progress
    from planner.load.results import settling, summarize
    from planner.serving.deployment import run

    requests = load.drawn()
    with Progress(enabled, "simulating") as progress:
        done = run(deployment, requests, concurrency=load.clients, on_progress=progress)
    return summarize(done, 0.0 if load.trace is not None else settling(done)).as_dict()


def _predicted(plan: ServePlan) -> dict[str, Any]:
    """What the plan says of itself, at the load that it was made for."""
    estimate = plan.estimate
    return {
        "ttft_s": dict(estimate.ttft_s),
        "tpot_s": dict(estimate.tpot_s),
        "e2e_s": dict(estimate.e2e_s),
        "requests_per_s": estimate.goodput_requests_per_s,
    }
