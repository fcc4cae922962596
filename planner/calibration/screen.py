"""Shows fits on the screen: constants with their intervals, what was kept and why, errors before, within and left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.calibration.robust_fit import Errors, Fit
from planner.report.terminal import Screen

__all__ = ["show_fits"]

_MOST_NOTES = 12
_BOUND = "at its bound"


def show_fits(fits: Mapping[str, Fit], path: str, notes: Sequence[str] = ()) -> None:
    """Prints every fit, then where the profile is."""
    screen = Screen()
    for name, found in fits.items():
        _show(screen, name, found)
    shown = [
        *notes[:_MOST_NOTES],
        *([f"and {len(notes) - _MOST_NOTES} more"] if len(notes) > _MOST_NOTES else []),
    ]
    screen.section("Left out of the fit", shown)
    screen.line()
    as_before = "" if any(found.fitted for found in fits.values()) else ", with every constant as before"
    screen.line(f"Wrote {path}{as_before}.")


def _show(screen: Screen, name: str, found: Fit) -> None:
    screen.line()
    folds = f"left out in {found.folds} parts" if found.left_out else "one group: nothing could be left out"
    groups = f" in {found.groups} groups" if found.groups > 1 else ""
    screen.line(f"{name}: {found.rows} rows{groups}, {folds}", "bold")
    if found.fitted:
        rows = [
            [c.name, f"{c.prior:.4g}", f"{c.value:.4g}", f"{c.low:.4g} to {c.high:.4g}", str(c.rows), _BOUND * c.at_bound]
            for c in found.fitted
        ]  # fmt: skip
        screen.grid(
            ["constant", "before", "fitted", "95 % interval", "rows", ""], rows, left=("constant", "")
        )
    else:
        screen.line("Nothing is fitted: these rows are too few, or do not tell the constants.", "bold")
    screen.section("Kept as before", [f"{c.name} = {c.prior:.4g}: {c.reason}" for c in found.kept])
    screen.line()
    errors: list[tuple[str, Errors | None]] = [("before", found.before)]
    if found.fitted:
        errors += [("fitted, same rows", found.within), ("fitted, left-out rows", found.left_out)]
    cells = [[label, *_cells(error)] for label, error in errors if error is not None]
    screen.grid(["error", "n", "median", "mean", "90th", "bias"], cells, left=("error",))
    which = "left-out " if found.left_out and found.fitted else ""
    screen.line(f"80 % of {which}rows lie within a factor of about {1 + found.spread:.3g}.")


def _cells(error: Errors) -> list[str]:
    values = (error.median, error.mean, error.p90)
    return [str(error.n), *(f"{100 * value:.1f} %" for value in values), f"{100 * error.bias:+.1f} %"]
