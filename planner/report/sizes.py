"""What several clusters, or the sizes of one, came to: the few that tell something as a table, the others counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from planner.report.terminal import Screen
from planner.units import format_count, format_seconds

if TYPE_CHECKING:
    from planner.solve.fleet import Attempt, Fleet

__all__ = ["show_clusters", "show_sizes"]

_MOST_ROWS = 6  # sizes with a plan of their own, nearest to the deadline first


def show_clusters(screen: Screen, fleet: Fleet, tokens_per_step: int) -> None:
    """Prints every cluster's best plan, or why it has none."""
    outcomes = ["" if attempt.outcome == "searched" else attempt.outcome for attempt in fleet.attempts]
    screen.line()
    _grid(screen, fleet.attempts, outcomes, tokens_per_step)


def show_sizes(screen: Screen, fleet: Fleet, deadline_s: float, tokens: float, tokens_per_step: int) -> None:
    """Prints the answer to a deadline: the size that meets it, those that nearly do, and what excludes the others."""
    best = fleet.result.best
    screen.line(
        f"Fewest devices that finish {format_count(tokens)} tokens in {format_seconds(deadline_s)}: "
        f"{best.devices:,} ({best.cluster})",
        "bold",
    )
    searched = [attempt for attempt in fleet.attempts if attempt.run_s is not None]
    nearest = sorted(searched, key=lambda attempt: attempt.run_s or 0.0)[:_MOST_ROWS]
    shown = [attempt for attempt in searched if attempt in nearest]
    screen.line()
    _grid(screen, shown, [attempt.outcome for attempt in shown], tokens_per_step)
    others = [attempt for attempt in fleet.attempts if attempt not in shown]
    screen.section("Smaller sizes that cannot be in time", list(_counted(others)))


def _grid(screen: Screen, attempts: Sequence[Attempt], outcomes: Sequence[str], tokens_per_step: int) -> None:
    """One line per attempt; columns that none of them has a value for are left out."""
    usd = [None if a.usd_per_step is None else 1e6 * a.usd_per_step / tokens_per_step for a in attempts]
    columns = {
        "cluster": [attempt.cluster for attempt in attempts],
        "devices": [f"{attempt.devices:,}" for attempt in attempts],
        "best step s": [_number(attempt.step_time_s, 3) for attempt in attempts],
        "run": ["-" if a.run_s is None else format_seconds(a.run_s) for a in attempts],
        "$/Mtoken": [_number(price, 3) for price in usd],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    rows = list(zip(*shown.values(), strict=True))
    screen.grid(list(shown), rows, ("cluster",), "", outcomes if any(outcomes) else ())


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _counted(attempts: Iterable[Attempt]) -> Iterable[str]:
    """One line per reason: how many sizes, of how many devices, and why they are of no use."""

    def reason(attempt: Attempt) -> str:
        return attempt.excluded_by

    for excluded_by, group in groupby(sorted(attempts, key=reason), key=reason):
        alike = sorted(group, key=lambda attempt: attempt.devices)
        last = alike[-1]
        count = sum(1 + attempt.smaller_too for attempt in alike)
        sizes = f"{count:,} sizes up to" if count > 1 else ""
        of_which = f"; {last.devices:,} devices: " if count > 1 else ": "
        told = {
            "": "searched in full; slower than those above",
            "kernel time": f"{last.outcome} or more",
            "step time": last.outcome,
            "no plan": f"no plan is valid and fits{of_which}{last.outcome}",
            "no mesh": f"no such cluster, or no mesh of its devices{of_which}{last.outcome}",
        }
        yield f"{sizes} {last.devices:,} devices: {told[excluded_by]}".strip()
