"""The screen of ``planner check``: what is wrong, what is wasted, and the way to the best plan."""

from __future__ import annotations

from collections.abc import Sequence

from planner.export.checking import Change, Finding
from planner.export.launched import LaunchedRun
from planner.plans.plan import Plan
from planner.report.plan_table import show_plans
from planner.report.terminal import Screen, gib, words
from planner.specs.problem import Problem

__all__ = ["finding_sentence", "show_check", "verdict"]


def show_check(
    problem: Problem,
    run: LaunchedRun,
    found: Sequence[Finding],
    plan: Plan | None,
    best: Plan | None,
    steps: Sequence[Change],
) -> None:
    """Prints the findings, then what the best plan would gain.

    Args:
        problem: the job.
        run: what was read.
        found: errors and warnings.
        plan: the configuration's plan; None where it cannot be priced.
        best: the best plan for the job; None where none fits.
        steps: the way from one to the other.
    """
    screen = Screen()
    screen.line(f"{run.launcher}, {problem.model.name} on {problem.cluster.name}: {verdict(found)}", "bold")
    screen.section("Wrong", [finding_sentence(finding) for finding in found if finding.level == "error"])
    screen.section("Wasteful", [finding_sentence(finding) for finding in found if finding.level == "warning"])
    screen.section("Read from the configuration", run.notes)
    if best is None:
        screen.section("The best plan", ["No plan for this job fits: planner train says what binds."])
        return
    if plan is None:
        screen.section("The best plan that it can run", [])
        show_plans(screen, [best], problem.objective)
        return
    _way(screen, plan, best, steps)
    show_plans(screen, [best, plan], problem.objective, joined=False)


def _way(screen: Screen, plan: Plan, best: Plan, steps: Sequence[Change]) -> None:
    """What each choice of the best plan gains, in order."""
    now_s, best_s = plan.estimate.step_time_s, best.estimate.step_time_s
    screen.line()
    misfit = best.estimate.fits and not plan.estimate.fits
    if not steps or (best_s > now_s * (1 - 1e-9) and not misfit):
        risky = best_s > now_s * (1 + 1e-9) and (plan.estimate.oom_probability or 0.0) > (
            best.estimate.oom_probability or 0.0
        )
        faster = f"It is faster than the best plan at an accepted risk of running out of memory ({best_s:.3f} s per step)."
        screen.line(faster if risky else "It is as fast as the best plan that was found.", "bold")
        return
    instead = f"{best_s:.3f} s instead of {now_s:.3f} s per step"
    told = "which would not fit" if misfit else f"{now_s / best_s:.2f}× as fast"
    screen.line(
        f"The best plan{' that fits' * misfit} takes {instead}{',' if misfit else ':'} {told}", "bold"
    )
    rows = [
        (f"{step.after_s - step.before_s:+.3f}", f"{step.after_s:.3f}", "" if step.fits else "no")
        for step in steps
    ]
    changes = [
        ", ".join(f"{words(name)} {was} → {now}" for name, (was, now) in step.knobs.items()) for step in steps
    ]
    screen.grid(("step by s", "then s", "fits"), rows, ("fits",), "change", changes)
    peak, budget = best.estimate.memory_bytes["peak"], best.estimate.memory_budget_bytes
    screen.line(f"It peaks at {gib(peak)} GiB of {gib(budget)} GiB.")


def verdict(found: Sequence[Finding]) -> str:
    """How many findings there are, in words."""
    wrong = sum(finding.level == "error" for finding in found)
    return (
        f"{wrong} wrong, {len(found) - wrong} wasteful" if found else "nothing wrong, nothing wasteful found"
    )


def finding_sentence(finding: Finding) -> str:
    """A finding, and which layer would have caught it."""
    return (
        f"{finding.what}. Caught by: {finding.caught_by}."
        if finding.caught_by
        else f"{finding.what.rstrip('.')}."
    )
