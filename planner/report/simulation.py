"""The screen of ``planner simulate``: latencies with their errors, beside what the plan predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.report.terminal import Screen

__all__ = ["show_simulation"]

_LATENCIES = {"ttft_s": "time to first token", "tpot_s": "time per output token", "e2e_s": "whole answer"}
_COLUMNS = ("mean", "p50", "p90", "p99")


def show_simulation(content: Mapping[str, Any]) -> None:
    """Prints one run."""
    screen, run, load = Screen(), content["simulated"], content["load"]
    if load["trace"] is not None:
        under = f"trace {load['trace']}"
    elif load["concurrency"] is not None:
        under = f"{load['concurrency']:,} requests in flight"
    else:
        under = f"{load['rate_per_s']:.4g} requests/s"
    screen.line(
        f"{under} · {run['requests']:,} requests measured · {run['request_iterations']:,} request-iterations",
        "bold",
    )
    screen.line()
    rows = []
    for name, title in _LATENCIES.items():
        if run[name] is not None:
            rows.append([f"{title}, ms", *(_with_error(run[name], column) for column in _COLUMNS)])
            if content["predicted"] is not None:
                rows.append(
                    [
                        f"  the plan, at {content['predicted']['requests_per_s']:.4g}/s",
                        *(_milliseconds(content["predicted"][name][c]) for c in _COLUMNS),
                    ]
                )
    gaps = run["iteration_s"]
    if gaps:
        rows.append(["iteration that decodes, ms", *(_milliseconds(gaps[column]) for column in _COLUMNS)])
    screen.grid(("", *_COLUMNS), rows, ("",))
    several = content["pools"] > 1
    busiest, of_any = ("the busiest is ", " of any") if several else ("", "")
    screen.section(
        "Pools" if several else "Pool",
        [
            f"{run['requests_per_s']:.4g} requests/s and {run['output_tokens_per_s']:,.0f} output tokens/s served",
            f"{busiest}busy {run['busy_fraction']:.0%} of the time, {run['mean_requests']:.1f} requests in an iteration{of_any} "
            f"on average, {run['preempted_fraction']:.1%} of requests gave way",
        ],
    )
    lines = ["± is half of a 95 % confidence interval: of the run, not of the iteration times in it."]
    if run["falls_behind"] and load["concurrency"] is None:
        lines.append(
            f"More came than was served: {run['waiting_at_end']:,} requests waited for their first token when the last one came. "
            "Times to the first token grow with the length of such a run."
        )
    screen.section("How sure", lines)


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.4g}"


def _with_error(latency: Mapping[str, float], column: str) -> str:
    value, error = 1e3 * latency[column], 1e3 * latency[f"{column}_error"]
    if not math.isfinite(error):
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0.0 else 3
    decimals = min(decimals, max(0, 3 - math.floor(math.log10(max(value, 1e-9)))))
    return f"{value:,.{decimals}f} ±{error:,.{decimals}f}"
