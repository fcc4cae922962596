"""The screen: headings, paragraphs and grids that fit the terminal's width, and plans in words."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from planner.plans.plan import Plan
from planner.units import GIB

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Screen", "gib", "knob_text", "knobs_that_differ", "mesh_text", "percent", "told_knobs", "words"]

_SHORT = {
    "micro_batch_size": "mb",
    "virtual_stages": "vpp",
    "zero_stage": "zero",
    "recompute_layers": "layers recomputed",
    "pipeline_layout": "layout",
}
_GAPS = ("  ", " ")
_NARROWEST_TAIL = 32  # columns that free text needs to stand beside its row
_WIDTH = 80  # where nothing says how wide the terminal is
_SAID_TO_BE = ("FORCE_COLOR", "TTY_COMPATIBLE")  # rich's ways to say that stdout is a terminal, or is none


class Screen:
    """Writes to stdout, as wide as the terminal (or ``COLUMNS``); plain where it is no terminal or ``NO_COLOR`` is set."""

    def __init__(self) -> None:
        self._console = _terminal()
        self.width = max(_columns() if self._console is None else self._console.width, 40)

    def line(self, text: str = "", style: str = "") -> None:
        """One line, wrapped where it is too long."""
        for part in textwrap.wrap(text, self.width) or [""]:
            self._print(part, style)

    def section(self, heading: str, paragraphs: Iterable[str], *, wrapped: bool = True) -> None:
        """A heading, and indented paragraphs; nothing where there are none. What is to be copied is not ``wrapped``."""
        texts = list(paragraphs)
        if texts:
            self.line()
            self.line(heading, "bold")
        self.indented(texts, wrapped=wrapped)

    def indented(self, paragraphs: Iterable[str], *, wrapped: bool = True) -> None:
        """Paragraphs under a heading."""
        for text in paragraphs:
            filled = textwrap.fill(text, self.width, initial_indent="  ", subsequent_indent="    ")
            self._print(filled if wrapped else f"  {text}")

    def grid(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Iterable[str] = (), tail: str = "",
        tails: Sequence[str] = (), bold: Iterable[int] = (), below: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """A table: numbers to the right, the ``left`` columns to the left.

        Args:
            headings: one per column.
            rows: cells, one list per row.
            left: headings of left-aligned columns.
            tail: heading of a last column of free text.
            tails: its cells; they go below their rows where the terminal is too narrow.
            bold: indices of rows that stand out.
            below: text that goes below each row in any case; empty where there is none.
        """
        widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
        lefts = set(left)
        longest = max((len(text) for text in (tail, *tails) if tails), default=0)
        cells = sum(widths)
        gap = next((g for g in _GAPS if self.width - cells - len(g) * len(widths) >= longest), _GAPS[0])
        beside = self.width - cells - len(gap) * len(widths)
        too_narrow = beside < min(longest, _NARROWEST_TAIL)
        if too_narrow:
            gap = next((g for g in _GAPS if cells + len(g) * (len(widths) - 1) <= self.width), _GAPS[-1])
        indent = " " * (widths[0] + len(gap))

        def joined(cells: Sequence[str]) -> str:
            return gap.join(
                cell.ljust(width) if heading in lefts else cell.rjust(width)
                for cell, width, heading in zip(cells, widths, headings, strict=True)
            )

        strong = set(bold)
        self._print(joined(headings) + (gap + tail if tails and not too_narrow else ""), "dim")
        for index, row in enumerate(rows):
            text = tails[index] if tails else ""
            line = joined(row)
            if text and not too_narrow:
                parts = textwrap.wrap(text, max(beside, 1)) or [""]
                line += ("\n" + " " * len(line)).join(gap + part for part in parts)
            self._print(line, "bold" if index in strong else "")
            for more in (text if too_narrow and text != "-" else "", below[index] if below else ""):
                if more:
                    filled = textwrap.fill(
                        more, self.width, initial_indent=indent, subsequent_indent=indent + "  "
                    )
                    self._print(filled, "dim")

    def _print(self, text: str, style: str = "") -> None:
        for part in map(str.rstrip, text.split("\n")):
            if self._console is None:
                print(part)
            else:
                self._console.print(part, style=style or None, soft_wrap=True)


def _terminal() -> Console | None:
    """The terminal that stdout is; None where it is none: what goes to a file is plain, and needs no library for styles."""
    if not sys.stdout.isatty() and not any(name in os.environ for name in _SAID_TO_BE):
        return None
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _columns() -> int:
    """How wide the terminal is behind whatever reads stdout; ``COLUMNS`` has the say."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit():
        return int(asked)
    for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, ValueError, OSError):  # closed, or no terminal
            return os.get_terminal_size(stream.fileno()).columns or _WIDTH  # type: ignore[union-attr]
    return _WIDTH


def gib(n_bytes: float) -> str:
    """Bytes as GiB without the unit.

    >>> gib(2**30 * 1.5)
    '1.5'
    """
    return f"{n_bytes / GIB:.1f}"


def percent(part: float, whole: float) -> str:
    """A share with one digit.

    >>> percent(1.0, 8.0), percent(1.0, 1e6)
    ('12.5 %', '<0.1 %')
    """
    if not whole:
        return "-"
    return "<0.1 %" if 0.0 < part / whole < 5e-4 else f"{100.0 * part / whole:.1f} %"


def words(name: str) -> str:
    """A key as words.

    >>> words("tensor_parallel")
    'tensor parallel'
    """
    return name.replace("_", " ")


def knob_text(name: str, value: Any) -> str:
    """A choice, shortly.

    >>> knob_text("micro_batch_size", 2), knob_text("sequence_parallel", True)
    ('mb 2', 'sequence parallel')
    """
    short = _SHORT.get(name, words(name))
    if value is True:
        return short
    if value is False:
        return f"no {short}"
    return f"{short} {value}"


def mesh_text(plan: Plan) -> str:
    """Degrees above 1, and the micro-batch size."""
    degrees = [f"{name} {n}" for name, n in plan.mesh.items() if n > 1]
    stages = plan.knobs["virtual_stages"]
    chunks = [f"vpp {stages}"] if stages > 1 else []
    return " · ".join([*degrees, *chunks, f"mb {plan.knobs['micro_batch_size']}"])


def told_knobs(plan: Plan) -> Mapping[str, Any]:
    """A plan's knobs; one in which its layers differ is ``per layer``."""
    if plan.layerwise is None:
        return plan.knobs
    used = {s for runs in plan.layerwise["stages"] for s, _ in runs}
    of_layers = [plan.layerwise["strategies"][s] for s in used]
    mixed = {slot for slot in of_layers[0] if len({str(strategy[slot]) for strategy in of_layers}) > 1}
    return {name: "per layer" if name in mixed else value for name, value in plan.knobs.items()}


def knobs_that_differ(plans: Iterable[Plan]) -> tuple[list[str], Mapping[str, Any]]:
    """Names of the knobs in which plans differ, and the values of those in which they agree."""
    every = [told_knobs(plan) for plan in plans]
    names = list(dict.fromkeys(name for knobs in every for name in knobs))
    differ = [name for name in names if any(k.get(name) != every[0].get(name) for k in every)]
    return differ, {name: every[0][name] for name in names if name not in differ}
