"""Blocks of a pipeline by device, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from planner.report.optimum import show_proof
from planner.report.terminal import Screen
from planner.units import format_bytes, format_seconds

__all__ = ["show_blocks"]


def show_blocks(content: Mapping[str, Any]) -> None:
    """Prints what every device holds, and what runs of neighbouring blocks would take."""
    screen = Screen()
    messages = f"{content['messages']} messages per micro-batch and direction"
    screen.line(f"{format_seconds(content['time_s'])} on the busiest device · {messages}", "bold")
    screen.line(_runs(content))
    screen.line()
    rows = []
    for device in sorted({block["device"] for block in content["blocks"]}):
        held = [block for block in content["blocks"] if block["device"] == device]
        kinds = Counter(block["name"].partition(".")[2] or block["name"] for block in held)
        told = ", ".join(f"{n} × {kind}" if n > 1 else kind for kind, n in kinds.items())
        seconds, n_bytes = (sum(block[name] for block in held) for name in ("time_s", "held_bytes"))
        rows.append((str(device), told, format_seconds(seconds), format_bytes(n_bytes)))
    screen.grid(("device", "blocks", "time", "memory"), rows, ("blocks",))
    show_proof(screen, content["certificate"], format_seconds)


def _runs(content: Mapping[str, Any]) -> str:
    """What the best cut into runs of neighbours comes to."""
    if content["runs_s"] is None:
        return "no cut into runs of neighbours fits"
    ratio, took = content["runs_s"] / content["time_s"], format_seconds(content["runs_s"])
    return f"{took} in the best runs of neighbours, {content['runs_messages']} messages: {ratio:.3f}×"
