"""How many replicas of a plan a day takes: its load period by period, with headroom for what the forecast misses.

A replica carries the load at which the plan keeps its promises, so the replicas of a period are its rate, headroom included, over
that load, rounded up, pool by pool. What a period needs beyond the one before has to start ahead of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from planner.costs.economics import rental_usd
from planner.costs.serving import replicas_needed
from planner.serving.plan import ServePlan, ServeResult
from planner.specs.serve_problem import ServeProblem

__all__ = ["daily_fleet", "over_a_day"]

_DAY_H = 24.0


def daily_fleet(
    plan: ServePlan, rates_per_s: Sequence[float], headroom: float, usd_per_hour: float | None
) -> dict[str, Any]:
    """A plan over a day.

    Args:
        plan: at the highest load of its replicas.
        rates_per_s: requests per second in equal periods of a day.
        headroom: fraction of a period's rate that may come beside it.
        usd_per_hour: of a device; None: not known.

    Returns:
        ``periods`` (rate, replicas of every pool, devices, utilization of the busiest), ``peak_devices``, ``mean_devices``,
        ``device_hours``, ``usd``, and ``saved``: the fraction of device hours that a fleet of constant size takes more.
    """
    served = plan.estimate.goodput_requests_per_s
    rates = np.asarray(rates_per_s, dtype=np.float64)
    counts = {
        index: np.asarray(replicas_needed(rates, served / pool.replicas, headroom))
        for index, pool in enumerate(plan.pools)
    }
    devices = sum(counts[index] * (pool.devices // pool.replicas) for index, pool in enumerate(plan.pools))
    devices = np.asarray(devices, dtype=np.float64)
    hours = float(np.sum(devices)) * _DAY_H / len(rates)
    busiest = np.max(
        [rates / np.maximum(counts[i] * served / p.replicas, 1e-300) for i, p in enumerate(plan.pools)],
        axis=0,
    )
    periods: list[Mapping[str, Any]] = [
        {
            "rate_per_s": float(rates[t]),
            "replicas": [int(counts[index][t]) for index in counts],
            "devices": int(devices[t]),
            "utilization": float(busiest[t]) if devices[t] else 0.0,
        }
        for t in range(len(rates))
    ]
    return {
        "periods": periods,
        "headroom": headroom,
        "peak_devices": int(np.max(devices)),
        "mean_devices": float(np.mean(devices)),
        "device_hours": hours,
        "usd": None if usd_per_hour is None else float(rental_usd(hours, usd_per_hour)),
        "saved": 1.0 - float(np.mean(devices)) / max(float(np.max(devices)), 1.0),
    }


def over_a_day(
    result: ServeResult, problem: ServeProblem, rates_per_s: Sequence[float], headroom: float
) -> ServeResult:
    """The plans of a search with their days, the cheapest day first."""
    days = [daily_fleet(plan, rates_per_s, headroom, problem.usd_per_hour) for plan in result.plans]
    order = sorted(
        range(len(days)), key=lambda index: (days[index]["device_hours"], days[index]["peak_devices"])
    )
    there = sum(cluster.devices for cluster in problem.clusters)
    days = [{**day, "missing_devices": max(day["peak_devices"] - there, 0)} for day in days]
    return replace(
        result,
        plans=tuple(result.plans[index] for index in order),
        days=tuple(days[index] for index in order),
    )
