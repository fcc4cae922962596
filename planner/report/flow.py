"""Unlike nodes by the layers that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.report.optimum import show_proof
from planner.report.terminal import Screen

__all__ = ["show_flow"]


def show_flow(content: Mapping[str, Any]) -> None:
    """Prints them."""
    screen, rate = Screen(), content["tokens_per_s"]
    screen.line(
        f"{rate:,.6g} tokens/s through all layers; {content['even_tokens_per_s'] / rate:.1%} of that in equal stages",
        "bold",
    )
    screen.line()
    rows = [
        (
            f"{span['first']} to {span['first'] + span['layers'] - 1}", f"{span['nodes']} x {span['kind']}",
            f"{span['tokens_per_s']:,.6g}",
        )
        for span in content["spans"]
    ]  # fmt: skip
    screen.grid(("layers", "nodes", "tokens/s"), rows, ("nodes",))
    show_proof(screen, content["certificate"], lambda value: f"{value:,.6g}", largest=True)
