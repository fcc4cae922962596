"""The peers of every stage of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.report.optimum import show_proof
from planner.report.terminal import Screen

__all__ = ["show_peers"]


def show_peers(content: Mapping[str, Any]) -> None:
    """Prints them."""
    screen = Screen()
    rate = content["rate"]
    screen.line(
        f"{rate:,.6g} micro-batches per unit of time; {content['longest_first_rate'] / rate:.1%} of that if the fastest go first",
        "bold",
    )
    screen.line()
    speeds = content["speeds"]
    rows = [
        (
            str(stage), f"{work:,g}", *(str(n) if n else "-" for n in counts),
            f"{sum(n * speed for n, speed in zip(counts, speeds, strict=True)) / work:,.6g}",
        )
        for stage, (work, counts) in enumerate(zip(content["works"], content["counts"], strict=True))
    ]  # fmt: skip
    screen.grid(("stage", "work", *(f"of {speed:,g}" for speed in speeds), "rate"), rows)
    show_proof(screen, content["certificate"], lambda value: f"{value:,.6g}", largest=True)
