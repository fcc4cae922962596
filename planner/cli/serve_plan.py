"""Serving plans in the verbs that take plans from files: ``estimate``, ``explain``, ``compare``, ``export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.serving.plan import ServePlan

__all__ = [
    "compare_serving",
    "estimate_serving",
    "explain_serving",
    "next_serving_plan",
    "read_serving_plan",
]


def read_serving_plan(reference: str) -> ServePlan | None:
    """The serving plan that a reference names; None where the file holds plans of another kind.

    Raises:
        SpecError: no such file or plan.
    """
    from planner.cli.plan_file import split_reference
    from planner.errors import Problem, SpecError
    from planner.serving.plan import ServePlan
    from planner.specs.reader import read_file

    path, which = split_reference(reference)
    data = read_file(path)
    plans = data.get("plans", [data])
    if not isinstance(plans, list) or not plans or not isinstance(plans[0], dict) or "pools" not in plans[0]:
        return None
    by_id = {str(plan.get("id")): plan for plan in plans if isinstance(plan, dict)}
    if which in by_id:
        return ServePlan.from_dict(by_id[which], f"{path}:{which}")
    if not which.isdigit() or not 1 <= int(which) <= len(plans):
        raise SpecError(
            Problem(f"{path}:{which}", "no such plan", f"1 to {len(plans)}, or one of {', '.join(by_id)}")
        )
    return ServePlan.from_dict(plans[int(which) - 1], f"{path}:{which}")


def next_serving_plan(reference: str, plan: ServePlan, to: str) -> int | None:
    """The number of the first other plan in the same file that a launcher can run; None where there is none."""
    from planner.cli.plan_file import split_reference
    from planner.errors import ExportError
    from planner.export.serving import find_serving_exporter, serving_problems
    from planner.export.serving.target import ServingTarget
    from planner.serving.plan import ServePlan
    from planner.specs.reader import read_file

    path, _ = split_reference(reference)
    data, exporter = read_file(path), find_serving_exporter(to)
    for number, fields in enumerate(data.get("plans", [data]), 1):
        other = ServePlan.from_dict(fields, f"{path}:{number}")
        if other.mode in ("offloaded", "static", "ping_pong") or any(pool.cluster for pool in other.pools):
            continue
        try:
            runs = other.id != plan.id and not serving_problems(ServingTarget(other), exporter)
        except ExportError:
            continue
        if runs:
            return number
    return None


def estimate_serving(plan: ServePlan, as_json: bool) -> None:
    """Prices a plan again and prints it."""
    from planner.cli.output import print_json
    from planner.plans.plan import SCHEMA_VERSION
    from planner.serving.replay import reprice

    now = reprice(plan)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "plans": [now.as_dict()]})
    else:
        from planner.report.serving import show_serve_plan

        show_serve_plan(now)


def explain_serving(plan: ServePlan, everything: bool, as_json: bool) -> None:
    """Prints where the seconds of a plan's iterations go."""
    from planner.cli.output import print_json
    from planner.plans.plan import SCHEMA_VERSION
    from planner.serving.replay import account

    pools = account(plan)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "plan": plan.as_dict(), "pools": pools})
    else:
        from planner.report.serving import show_account, show_serve_plan

        show_serve_plan(plan)
        show_account(pools, everything)


def compare_serving(one: ServePlan, other: ServePlan, as_json: bool) -> None:
    """Prints two plans side by side, quantity by quantity."""
    from planner.cli.output import print_json
    from planner.report.serving import serving_comparison, show_serving_comparison

    content: dict[str, Any] = serving_comparison(one, other)
    if as_json:
        print_json(content)
    else:
        show_serving_comparison(content)
