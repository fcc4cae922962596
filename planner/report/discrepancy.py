"""Why a run is slower, or larger, than predicted: which terms could make up the difference, the likeliest first.

Terms err independently, each by its own deviation (fitted to published runs). Given the whole difference, what a term is expected
to have contributed is its part of the variance: (seconds × deviation)² over the sum of all. So a large certain term may explain
less than a small uncertain one. Other software is priced too: the run may simply not be what its stack says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from planner.errors import PlannerError
from planner.plans.assemble import Assembly
from planner.report.terminal import Screen, gib
from planner.solve.named import estimate
from planner.specs.problem import Problem
from planner.specs.stack import list_stacks, load_stack
from planner.uncertainty.constants import share_of_software
from planner.uncertainty.judgement import time_spread
from planner.uncertainty.residuals import Residuals, Spread, load_residuals
from planner.uncertainty.terms import OUTSIDE, PEAK_TERMS, TIME_TERMS, Term, peak_parts, time_parts
from planner.units import format_seconds

__all__ = ["discrepancy", "show_discrepancy"]

_NEGLIGIBLE = 0.01  # of the difference
_UNKNOWN = 0.25  # deviation of a term that no published run had: as the others


def discrepancy(
    problem: Problem, assembly: Assembly, measured_s: float | None, measured_bytes: float | None
) -> dict[str, Any]:
    """What could make up the difference between a run and its prediction.

    Args:
        problem, assembly: the plan, as it is priced now.
        measured_s: measured step time.
        measured_bytes: measured peak memory of a process.

    Returns:
        ``step_time`` and ``peak``, each None unless measured: ``measured``, ``predicted``, ``interval``; ``beyond``, the share of
        published runs of its kind that are less far off on that side; and ``terms``, the likeliest first: ``name``, ``what``, the
        ``planned`` part, its ``share`` of the difference, ``alone`` (the factor that it would have to be off by to explain all;
        None where it cannot), ``why`` and ``check``. ``stacks``: step time of the plan under every other shipped stack.
    """
    residuals, now = load_residuals(), assembly.plan.estimate
    stack = problem.stack.on_generation(problem.cluster.device.generation)
    found: dict[str, Any] = {"step_time": None, "peak": None, "stacks": {}}
    if measured_s is not None:
        parts = time_parts(now.step_time_s, now.breakdown_s, assembly.spends, float(stack.dispatch_s))
        spread = (
            None
            if residuals is None
            else time_spread(residuals, problem, now.step_time_s, now.breakdown_s, assembly.spends)
        )
        terms = _terms(TIME_TERMS, parts, measured_s - now.step_time_s, _deviations(residuals, "step_time"))
        found["step_time"] = {**_compared(now.step_time_s, measured_s, spread), "terms": terms}
        found["stacks"] = _other_stacks(problem, assembly)
    if measured_bytes is not None:
        peak = now.memory_bytes["peak"]
        held = peak_parts(now.memory_bytes)
        pools = assembly.device_memory[assembly.fullest]
        spread = None if residuals is None else residuals.peak.at(share_of_software(pools))
        terms = _terms(PEAK_TERMS, held, measured_bytes - peak, _deviations(residuals, "peak"))
        found["peak"] = {**_compared(peak, measured_bytes, spread), "terms": terms}
    return found


def show_discrepancy(screen: Screen, found: Mapping[str, Any], everything: bool) -> None:
    """Prints what :func:`discrepancy` found; ``everything`` lists terms that hardly matter too."""
    said: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("step_time", format_seconds),
        ("peak", lambda n_bytes: f"{gib(n_bytes)} GiB"),
    )
    for key, text in said:
        one = found[key]
        if one is None:
            continue
        measured, predicted = one["measured"], one["predicted"]
        screen.line()
        screen.line(
            f"Why {text(measured)} and not {text(predicted)} ({100.0 * (measured / predicted - 1.0):+.1f} %)",
            "bold",
        )
        screen.line(_verdict(one, text))
        shown = [term for term in one["terms"] if everything or term["share"] >= _NEGLIGIBLE]
        rows = [
            (f"{term['share']:.0%}", text(term["planned"]), _alone(term["alone"]), term["what"])
            for term in shown
        ]
        below = [f"{term['why']}. Look at: {term['check']}" for term in shown]
        headings = ("of it", "planned", "alone", "the likeliest first")
        screen.grid(headings, rows, headings[-1:], below=below)
    if found["stacks"]:
        told = [f"{stack} {format_seconds(step_s)}" for stack, step_s in found["stacks"].items()]
        screen.section("The same plan under other software", [" · ".join(told)])


# -- details ---------------------------------------------------------------------------------------------------------


def _deviations(residuals: Residuals | None, quantity: str) -> Mapping[str, float]:
    return {} if residuals is None else getattr(residuals, quantity).terms


def _compared(predicted: float, measured: float, spread: Spread | None) -> dict[str, Any]:
    """Both values, and how unusual their difference is."""
    if spread is None:
        return {"measured": measured, "predicted": predicted, "interval": None, "beyond": None}
    above = spread.probability_above(predicted, measured)
    beyond = 1.0 - above if measured > predicted else above
    return {
        "measured": measured, "predicted": predicted, "interval": list(spread.interval(predicted)), "beyond": beyond,
    }  # fmt: skip


def _terms(
    terms: Sequence[Term], parts: Mapping[str, float], difference: float, deviations: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Terms by what they are expected to have contributed."""
    possible = [term for term in terms if term.name in parts and (difference > 0.0 or term.why_less)]
    variances = {
        term.name: (parts[term.name] * deviations.get(term.name, _UNKNOWN)) ** 2 for term in possible
    }
    whole = sum(variances.values())
    found = [
        {
            "name": term.name,
            "what": term.what,
            "planned": parts[term.name],
            "share": variances[term.name] / whole if whole else 0.0,
            "alone": _needed(term, parts[term.name], difference),
            "why": term.why if difference > 0.0 else term.why_less,
            "check": term.check,
        }
        for term in possible
    ]
    return sorted(found, key=lambda term: -float(term["share"]))


def _needed(term: Term, part: float, difference: float) -> float | None:
    """By which factor a term would have to be off to explain everything; None where it cannot."""
    if term.name == "overlap":  # what is hidden can come to light once
        return 1.0 if difference <= part else None
    factor = (part + difference) / part if part else inf
    return factor if 0.0 <= factor < inf and term.name != OUTSIDE else None


def _other_stacks(problem: Problem, assembly: Assembly) -> dict[str, float]:
    """The plan's step under every other shipped stack, with the choices that it has."""
    plan = assembly.plan
    fixed = {name: str(value).lower() for name, value in {**plan.mesh, **plan.knobs}.items()}
    found = {}
    for name in list_stacks():
        stack = load_stack(name)
        if name == problem.stack.name or stack.serving is not None:
            continue
        try:
            other = estimate(replace(problem, stack=stack, fixed=fixed))
        except PlannerError:  # a stack that cannot run this plan says nothing
            continue
        found[name] = other.estimate.step_time_s
    return dict(sorted(found.items(), key=lambda one: one[1]))


def _verdict(one: Mapping[str, Any], text: Callable[[float], str]) -> str:
    if one["interval"] is None:
        return "Nothing is known of how far off such predictions are."
    low, high = one["interval"]
    expected = (
        f"80 % of published runs of its kind lie between {text(low)} and {text(high)} of such a prediction"
    )
    if low <= one["measured"] <= high:
        return f"Nothing needs to be wrong: {expected}."
    return f"{expected}; {one['beyond']:.0%} are less far off on this side."


def _alone(factor: float | None) -> str:
    if factor is None:
        return "-"
    return "all of it" if factor == 1.0 else f"×{factor:.2f}"
