"""The screens of a deployment that runs already: what it is predicted to deliver, what is wrong, and the way to the best plan."""

from __future__ import annotations

from collections.abc import Sequence

from planner.export.checking import Finding
from planner.export.serving.checking import Step
from planner.report.checked import finding_sentence, verdict
from planner.report.serving import pool_text, show_serve_plan
from planner.report.terminal import Screen, words
from planner.serving.plan import ServePlan
from planner.specs.serve_problem import ServeProblem

__all__ = ["show_launch", "show_served_check"]


def show_launch(plan: ServePlan, best: ServePlan | None, notes: Sequence[str]) -> None:
    """Prints what a launch is predicted to deliver."""
    show_serve_plan(plan)
    screen = Screen()
    screen.section("Read from the configuration", notes)
    if best is not None:
        screen.section("The best plan that the engine runs", [_gain(plan, best)])


def show_served_check(
    launcher: str,
    problem: ServeProblem,
    found: Sequence[Finding],
    notes: Sequence[str],
    plan: ServePlan | None,
    best: ServePlan | None,
    steps: Sequence[Step],
) -> None:
    """Prints the findings, then what the best plan would gain.

    Args:
        launcher: the engine.
        problem: model, machines and traffic.
        found: errors and warnings.
        notes: what was read, and taken for granted.
        plan: what is launched; None where it cannot be priced.
        best: the best plan that the engine runs; None where none keeps the promises.
        steps: the way from one to the other.
    """
    screen = Screen()
    screen.line(f"{launcher}, {problem.model.name} on {problem.cluster.name}: {verdict(found)}", "bold")
    screen.section("Wrong", [finding_sentence(f) for f in found if f.level == "error"])
    screen.section("Wasteful", [finding_sentence(f) for f in found if f.level == "warning"])
    screen.section("Read from the configuration", notes)
    if plan is not None:
        e = plan.estimate
        delivered = (
            f"{e.goodput_requests_per_s:.4g} requests/s, {e.output_tokens_per_s_per_device:.0f} output tokens/s per device, "
            f"first token {e.ttft_s['mean'] * 1e3:.0f} ms, then {e.tpot_s['mean'] * 1e3:.1f} ms per token; bound by {e.binding}"
        )
        screen.section("Predicted", [f"{' | '.join(pool_text(pool) for pool in plan.pools)}: {delivered}"])
    if best is None:
        screen.section("The best plan", ["No plan keeps the promises: planner serve says what binds."])
    elif plan is None:
        screen.section("The best plan that the engine runs", [_pools(best)])
    else:
        screen.section("The best plan that the engine runs", [_gain(plan, best)])
        _way(screen, steps)


def _way(screen: Screen, steps: Sequence[Step]) -> None:
    """What each choice of the best plan gains, in order."""
    rows = [
        (f"{step.after_tokens_per_s - step.before_tokens_per_s:+.0f}", f"{step.after_tokens_per_s:.0f}")
        for step in steps
    ]
    changes = [
        ", ".join(f"{words(name)} {was} → {now}" for name, (was, now) in step.knobs.items()) for step in steps
    ]
    if rows:
        screen.line()
        screen.grid(("tok/s/device", "then"), rows, (), "change", changes)


def _pools(plan: ServePlan) -> str:
    return " | ".join(pool_text(pool) for pool in plan.pools)


def _gain(plan: ServePlan, best: ServePlan) -> str:
    now, then = (p.estimate.output_tokens_per_s_per_device for p in (plan, best))
    if then <= now * (1.0 + 1e-9):
        return "It delivers as much per device as the best plan that was found."
    return f"{_pools(best)}: {then:.0f} output tokens/s per device instead of {now:.0f}, {then / now:.2f}× as many"
