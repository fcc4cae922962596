"""Why no plan is left: which limit binds, by how much, and the nearest change that was tried and fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import Any

from planner.errors import Problem as Fault
from planner.serving.candidates import Account
from planner.specs.cluster_file import load_cluster
from planner.specs.serve_problem import ServeProblem
from planner.units import counted

__all__ = ["reasons"]

_LIMITS = {"ttft": ("ttft_s", "--ttft-ms"), "tpot": ("tpot_s", "--tpot-ms"), "e2e": ("e2e_s", "--e2e-ms")}
_SLACKS = (1.005, 1.05, 1.2, 2.0)
_NARROWER = ("fp8", "int8_wo", "nvfp4", "int4_wo")
_WIDE = ("bf16", "int8_wo", "int4_wo")
"""Formats whose products are of 16 bits, which every device has."""
_SHORTHAND = re.compile(r"(.+):(\d+)x(\d+)")
_MOST_NODES = 4096

Fits = Callable[[ServeProblem], bool]


def reasons(problem: ServeProblem, account: Account, fits: Fits) -> list[Fault]:
    """What to tell the user, the limit that is missed by least first.

    Args:
        problem: without a plan.
        account: how its candidates went.
        fits: whether a changed problem has a plan.
    """
    nearest = sorted(account.nearest.items(), key=lambda item: item[1][0])
    late = {limit: found for limit, found in nearest if limit in _LIMITS}
    faults = []
    if late:
        faults += _late(problem, late, fits)
    for limit, (ratio, where) in nearest:
        if limit == "rate":
            faults.append(_rate(problem, ratio, where, fits))
        elif limit == "memory" and len(nearest) == 1:
            faults.append(_memory(problem, ratio, where, fits))
    if not faults:
        told = ", ".join(f"{count} {reason}" for reason, count in account.rejected.most_common(3) if count)
        where = "--fix" if problem.fixed else "--forbid" if problem.forbidden else "serve"
        faults.append(
            Fault(where, f"no candidate is left ({told})", "one that is valid", _left_out(problem, fits))
        )
    return faults


def _left_out(problem: ServeProblem, fits: Fits) -> str:
    """What to change where no candidate is valid: one of the told choices, or the format of the weights."""
    changes = [
        f"leave out --fix {name}={value}"
        for name, value in problem.fixed.items()
        if fits(replace(problem, fixed={k: v for k, v in problem.fixed.items() if k != name}))
    ]
    changes += [
        f"--precision {name}"
        for name in _WIDE
        if name not in problem.precisions and fits(replace(problem, precisions=(name,)))
    ][:1]
    if not changes:
        return "Leave some of it out."
    text = ", or ".join(changes)
    return f"{text[0].upper()}{text[1:]}{' fits' if changes[-1].startswith('--precision') else ''}."


def _late(problem: ServeProblem, late: dict[str, tuple[float, str]], fits: Fits) -> list[Fault]:
    """Latency limits that nothing keeps; all are relaxed together until something does."""
    change = ""
    for slack in _SLACKS:
        limits: dict[str, Any] = {
            _LIMITS[name][0]: _rounded(problem, name, ratio * slack) for name, (ratio, _) in late.items()
        }
        if fits(replace(problem, traffic=replace(problem.traffic, **limits))):
            texts = [f"{_LIMITS[name][1]} {limits[_LIMITS[name][0]] * 1e3:g}" for name in late]
            change = f"{' with '.join(texts)} fits."
            break
    faults = []
    for name, (ratio, where) in late.items():
        field, flag = _LIMITS[name]
        allowed = getattr(problem.traffic, field) * 1e3
        found = f"nothing is faster than {allowed * ratio:.4g} ms at the lightest load, {ratio:.3g} times the limit ({where})"
        faults.append(Fault(flag, found, f"at most {allowed:g} ms", change or "Faster devices would help."))
    return faults


def _rounded(problem: ServeProblem, name: str, factor: float) -> float:
    """A limit times a factor, up to a tenth of a millisecond."""
    return float(ceil(getattr(problem.traffic, _LIMITS[name][0]) * factor * 1e4) / 1e4)


def _rate(problem: ServeProblem, ratio: float, where: str, fits: Fits) -> Fault:
    wanted = problem.traffic.rate_per_s or 0.0
    most = wanted / ratio
    changes = [f"--rate {most:.4g} is the most"] if not where else []
    for share in (0.99, 0.9, 0.75, 0.5):
        less = float(f"{most * share:.3g}")
        if fits(replace(problem, traffic=replace(problem.traffic, rate_per_s=less))):
            changes = [f"--rate {less:g} fits"]
            break
    larger = _more_nodes(problem, ratio, fits)
    changes += [f"--cluster {larger} fits"] if larger else []
    devices = sum(cluster.devices for cluster in problem.clusters)
    found = f"with {counted(devices, 'device')} at most {most:.4g} requests/s are answered, {100.0 / ratio:.3g} % of it ({where})"
    return Fault(
        "--rate", found, f"{wanted:g} requests/s", f"{', or '.join(changes)}." if changes else "More devices."
    )


def _memory(problem: ServeProblem, ratio: float, where: str, fits: Fits) -> Fault:
    found = f"weights, buffers and one request take {ratio:.3g} times what a device offers ({where})"
    without = replace(
        problem, traffic=replace(problem.traffic, ttft_s=None, tpot_s=None, e2e_s=None, rate_per_s=None)
    )
    for tried, outcome in ((problem, "fits"), (without, "fits, without the limits and the rate")):
        changes = []
        if narrower := next(
            (name for name in _formats(tried) if fits(replace(tried, precisions=(name,)))), None
        ):
            changes.append(f"--precision {narrower}")
        if larger := _more_nodes(tried, ratio, fits):
            changes.append(f"--cluster {larger}")
        eight = tried.cluster.device.supports("fp8") and tried.caches == ("bf16",)
        if eight and fits(replace(tried, caches=("fp8",))):
            changes.append("--cache fp8")
        if changes:
            return Fault(
                "device memory", found, "room for one request", f"{', or '.join(changes)} {outcome}."
            )
    return Fault("device memory", found, "room for one request", "Larger devices, or shorter prompts.")


def _formats(problem: ServeProblem) -> Iterator[str]:
    """Formats that are narrower than those that were tried, widest first."""
    tried = problem.precisions[-1]
    rank = {
        "fp8": 1,
        "fp8_block": 1,
        "int8_wo": 1,
        "nvfp4": 2,
        "int4_wo": 2,
        "w4a16_mxfp4": 2,
        "w4a8_mxfp4_mxfp8": 2,
    }
    yield from (name for name in _NARROWER if rank[name] > rank.get(tried, 0))


def _more_nodes(problem: ServeProblem, ratio: float, fits: Fits) -> str:
    """The cluster's shorthand with the fewest nodes, by doubling, that have a plan; empty where none is found."""
    match = _SHORTHAND.fullmatch(problem.cluster.name)
    if match is None or problem.others:
        return ""
    device, nodes, each = match[1], int(match[2]), int(match[3])
    count = max(nodes + 1, ceil(nodes * min(ratio, _MOST_NODES)))
    for _ in range(4):
        if count > _MOST_NODES:
            break
        name = f"{device}:{count}x{each}"
        if fits(replace(problem, cluster=replace(load_cluster(name), name=name))):
            return name
        count *= 2
    return ""
