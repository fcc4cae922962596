"""Fits the constants of serving stacks to published runs, and says how well they carry over to models that were left out.

    python benchmarks/fit_serving.py [--write] [--errors FILE.json] [--rounds N] [--every N] FILE.csv…

One fit of all stacks: logarithms of the constants are a common centre, which is drawn to physical expectations, and a deviation
per stack and generation of accelerators, drawn to zero, so that a stack with few models leans on the others: Gauss-Newton
steps on the logarithms of measured over predicted values: times between tokens, times to the first token (at less
weight), latencies and rates. Large residuals count with a weight that falls (soft L1); a model counts as at most so many
rows, since what its rows miss they mostly miss together. A model is left out by solving the last step again without
its rows, on every stack. ``--write`` puts the results behind the line ``# -- fitted`` of the stacks' files.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.specs.device import Sourced
from planner.specs.library import hardware_folder
from planner.specs.stack import Stack, load_stack
from planner.validation.serving import contradicted, excluded, predict, served_runs
from planner.validation.serving_bars import bar_of
from planner.validation.serving_runs import ServedRun
from planner.validation.table import read_table

STACK = (
    "matmul_slowdown",
    "grouped_matmul_slowdown",
    "attention_slowdown",
    "stream_slowdown",
    "collective_slowdown",
    "dispatch_s",
)
SERVING = (
    "iteration_s",
    "sequence_s",
    "start_share",
    "call_share",
    "prompt_slowdown",
    "experts_prompt_slowdown",
    "admission_s",
)
# What the centre is drawn to, with standard deviations of the logarithm: of the centre, and of a stack from it.
PRIORS = {
    "matmul_slowdown": (0.9, 0.25, 0.15),
    "grouped_matmul_slowdown": (0.9, 0.25, 0.15),
    "attention_slowdown": (1.0, 0.3, 0.15),
    "stream_slowdown": (1.0, 0.25, 0.15),
    "collective_slowdown": (1.0, 0.35, 0.25),
    "dispatch_s": (5e-6, 0.3, 1.0),
    "iteration_s": (1.5e-3, 0.7, 0.5),
    "sequence_s": (8e-6, 0.7, 0.4),
    "start_share": (0.6, 0.4, 0.25),
    "call_share": (0.4, 0.6, 0.3),
    "prompt_slowdown": (1.0, 0.2, 0.2),
    "experts_prompt_slowdown": (1.0, 0.3, 0.15),
    "admission_s": (0.03, 0.7, 0.7),
}
NAMES = (*STACK, *SERVING)
WEIGHTS = {"tpot": 1.0, "ttft": 0.7, "latency": 1.0, "output_tokens_per_s": 1.0}
MARK = "# -- fitted by benchmarks/fit_serving.py"
_STEP, _LONGEST, _SCALE, _FEWEST = 0.06, 0.7, 0.1, 20
_RESIDUAL = 0.2  # typical: what a standard deviation of a constant weighs against a row's
_ROWS_OF_A_MODEL = 40.0
Cell = tuple[str, str]
Case = tuple[ServedRun, str, float]


@dataclass(frozen=True)
class Fit:
    """Values of a set of rows, the constants that they are fitted with, and the last step's linearisation."""

    cases: list[Case]
    cells: list[Cell]
    theta: Any  # (cells, constants), logarithms
    centre: Any  # (constants,), logarithms: what a stack and generation without rows takes
    errors: Any  # logarithm of predicted over measured, per case, at theta
    left_out: Any  # the same with constants from the other models' rows


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument(
        "--errors", metavar="FILE.json", help="errors of models left out, for accuracy_serving.py"
    )
    arguments.add_argument(
        "--residuals",
        metavar="FILE.json",
        help="write intervals, for planner/uncertainty/serving_residuals.json",
    )
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--every", type=int, default=1, help="take every n-th set of runs that are priced together"
    )
    arguments.add_argument("files", nargs="+", metavar="FILE.csv")
    options = arguments.parse_args()
    found = fit(read_cases(options.files, options.every), options.rounds)
    for title, errors in (("in sample", found.errors), ("models left out", found.left_out)):
        print(title)
        for name, values in statistics(found.cases, errors).items():
            print(
                f"  {name}: n={values['n']} median {values['median']:.1%} 90th {values['p90']:.1%} bias {values['bias']:+.1%}"
            )
    for cell, logarithms in zip(found.cells, found.theta, strict=True):
        constants = dict(zip(NAMES, np.exp(logarithms), strict=True))
        print(*cell, ", ".join(f"{name} {value:.3g}" for name, value in constants.items()))
        if options.write:
            write(*cell, constants)
    constants = dict(zip(NAMES, np.exp(found.centre), strict=True))
    print("centre", ", ".join(f"{name} {value:.3g}" for name, value in constants.items()))
    if options.write:
        write_centre(constants)
    if options.residuals:
        Path(options.residuals).write_text(json.dumps(residuals(found), indent=1) + "\n", encoding="utf-8")
    if options.errors:
        text = json.dumps(statistics(found.cases, found.left_out), indent=1)
        Path(options.errors).write_text(text + "\n", encoding="utf-8")


def read_cases(files: list[str], every: int = 1) -> list[Case]:
    """What the files measured and the planner predicts, of stacks with rows enough."""
    cases: list[Case] = []
    for path in files:
        runs = served_runs(read_table(path))
        apart = contradicted(runs)
        groups = {group: index for index, group in enumerate(dict.fromkeys(run.group for run, _ in runs))}
        for run, measured in runs:
            if groups[run.group] % every:
                continue
            cases += [
                (run, metric, value)
                for metric, value in measured.items()
                if metric in WEIGHTS and not excluded(run, metric, measured, run.row.row_id in apart)
            ]
    rows = Counter(_cell(run) for run, _, _ in cases)
    return [case for case in cases if rows[_cell(case[0])] * every >= _FEWEST]


def fit(cases: list[Case], rounds: int) -> Fit:
    """Constants of all stacks, and errors with and without each model's own rows."""
    cells = sorted({_cell(run) for run, _, _ in cases})
    at = np.array([cells.index(_cell(run)) for run, _, _ in cases])
    theta = np.array([_now(load_stack(name), generation) for name, generation in cells])
    measured = np.log([value for _, _, value in cases])
    families = [_family(run) for run, _, _ in cases]
    rows = Counter(zip(at.tolist(), families, strict=True))
    shares = [
        min(1.0, _ROWS_OF_A_MODEL / rows[key]) ** 0.5 for key in zip(at.tolist(), families, strict=True)
    ]
    weight = np.array([WEIGHTS[metric] for _, metric, _ in cases]) * shares
    slopes = None
    for _ in range(rounds):
        now = _predicted(cells, theta, cases)
        if slopes is None:  # they hardly change in the following rounds, and take all the time
            slopes = _slopes(cells, theta, cases, now)
        told = np.isfinite(now) & np.isfinite(slopes).all(axis=1)
        slopes[~told] = 0.0
        gap = np.where(told, measured - now, 0.0)
        goal = gap + np.einsum("ij,ij->i", slopes, theta[at])
        before = theta
        found, centre = _solve(slopes, goal, weight * told, at, len(cells))
        theta = theta + np.clip(found - theta, -_LONGEST, _LONGEST)
    left_out = np.full(len(cases), np.nan)
    on_engine = defaultdict(set)  # a model alone on its engine leaves nothing to fit that engine to
    for (run, _, _), family in zip(cases, families, strict=True):
        on_engine[run.stack.name].add(family)
    shared = np.array([len(on_engine[run.stack.name]) for run, _, _ in cases])
    for family in dict.fromkeys(families):
        own = np.array([other == family for other in families]) & (shared > 1)
        if not own.any():
            continue
        others, _ = _solve(slopes, goal, weight * told * ~own, at, len(cells))
        moved_by = np.clip(others - before, -_LONGEST, _LONGEST)[at[own]]
        left_out[own] = (now - measured)[own] + np.einsum("ij,ij->i", slopes[own], moved_by)
    return Fit(cases, cells, theta, centre, _predicted(cells, theta, cases) - measured, left_out)


def _slopes(cells: list[Cell], theta: Any, cases: list[Case], now: Any) -> Any:
    """How the logarithms of predictions move with those of the constants."""
    slopes = np.zeros((len(cases), len(NAMES)))
    for index, name in enumerate(NAMES):
        moved = theta.copy()
        moved[:, index] += _STEP
        own = [at for at, (run, _, _) in enumerate(cases) if _moves(name, run)]
        slopes[own, index] = (_predicted(cells, moved, [cases[at] for at in own]) - now[own]) / _STEP
    return slopes


def _moves(name: str, run: ServedRun) -> bool:
    """Whether a run can depend on a constant at all."""
    if name in ("grouped_matmul_slowdown", "experts_prompt_slowdown"):
        return any(block.moe is not None for block in run.model.blocks.values())
    if name == "collective_slowdown":
        return math.prod(run.degrees[:3]) > 1
    if name == "dispatch_s":  # where graphs hide it, it sets no pace
        assert run.stack.serving is not None
        return float(run.stack.serving.graph_sequences) == 0.0
    return name != "admission_s" or run.driver in ("concurrency", "pools", "rate")


def _solve(slopes: Any, goal: Any, weight: Any, at: Any, cells: int) -> tuple[Any, Any]:
    """Constants per cell, and their centre: reweighted least squares over the centre and the cells' deviations from it."""
    count = len(NAMES)
    centre = np.log([PRIORS[name][0] for name in NAMES])
    keep = _RESIDUAL / np.array([PRIORS[name][1:] for name in NAMES])
    found = np.zeros(count * (cells + 1))
    found[:count] = centre
    for _ in range(8):
        theta = found[:count] + found[count:].reshape(cells, count)
        residual = goal - np.einsum("ij,ij->i", slopes, theta[at])
        robust = weight**2 / np.sqrt(1.0 + (residual / _SCALE) ** 2)
        matrix = np.diag(np.concatenate([keep[:, 0] ** 2, np.tile(keep[:, 1] ** 2, cells)]))
        right = np.concatenate([keep[:, 0] ** 2 * centre, np.zeros(count * cells)])
        for cell in range(cells):
            own = at == cell
            square = slopes[own].T @ (slopes[own] * robust[own, None])
            aim = slopes[own].T @ (robust[own] * goal[own])
            here = slice(count * (cell + 1), count * (cell + 2))
            for rows in (slice(count), here):
                for columns in (slice(count), here):
                    matrix[rows, columns] += square
                right[rows] += aim
        found = np.linalg.solve(matrix, right)
    return found[:count] + found[count:].reshape(cells, count), found[:count]


def _predicted(cells: list[Cell], theta: Any, cases: list[Case]) -> Any:
    """Logarithms of predictions; not a number where there is none."""
    stacks: dict[str, Stack] = {}
    for (name, generation), logarithms in zip(cells, theta, strict=True):
        constants = dict(zip(NAMES, np.exp(logarithms), strict=True))
        stacks[name] = _with(stacks.get(name) or load_stack(name), generation, constants)
    runs: dict[int, ServedRun] = {id(run): run for run, _, _ in cases}
    found = dict(zip(runs, predict(list(runs.values()), stacks), strict=True))
    values = []
    for run, metric, _ in cases:
        result = found[id(run)]
        known = not isinstance(result, str) and metric in result
        values.append(np.log(max(result[metric], 1e-12)) if known else np.nan)  # type: ignore[call-overload]
    return np.array(values)


def _now(stack: Stack, generation: str) -> list[float]:
    """Logarithms of the constants that a stack has."""
    assert stack.serving is not None
    there, served = stack.on_generation(generation), stack.serving.on_generation(generation)
    own = [float(getattr(there, name)) for name in STACK] + [float(getattr(served, name)) for name in SERVING]
    return [float(x) for x in np.log(own)]


def _with(stack: Stack, generation: str, constants: dict[str, float]) -> Stack:
    """The stack with constants on a generation."""
    number = {
        name: Sourced(float(value), "fitted", "published-serving-runs") for name, value in constants.items()
    }
    assert stack.serving is not None
    on = {**stack.on, generation: {**stack.on.get(generation, {}), **{n: number[n] for n in STACK}}}
    served = {
        **stack.serving.on,
        generation: {**stack.serving.on.get(generation, {}), **{n: number[n] for n in SERVING}},
    }
    return replace(stack, on=on, serving=replace(stack.serving, on=served))


def _cell(run: ServedRun) -> Cell:
    return run.stack.name, run.cluster.device.generation


def _family(run: ServedRun) -> tuple[int, int]:
    """Models of one shape are one model."""
    return run.model.hidden, run.model.n_layers


def residuals(found: Fit) -> dict[str, Any]:
    """Quantiles of measured over predicted that hold 80 % of the runs of models that were left out."""
    told: dict[str, Any] = {
        "about": "Measured over predicted, 10 % and 90 % quantiles, of published serving runs of models left out of the "
        "fit of their stack's constants: benchmarks/fit_serving.py --residuals writes this file."
    }
    for name, values in statistics(found.cases, found.left_out).items():
        if ":" not in name:
            chosen = [
                _family(run)
                for (run, metric, _), error in zip(found.cases, found.left_out, strict=True)
                if np.isfinite(error) and bar_of(run, metric) == name
            ]
            low, high = values["interval"]
            told[name] = {"low": low, "high": high, "rows": values["n"], "models": len(set(chosen))}
    return told


def statistics(cases: list[Case], errors: Any) -> dict[str, dict[str, Any]]:
    """Errors by what they are held to, and by stack and generation within it."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for (run, metric, _), error in zip(cases, errors, strict=True):
        if np.isfinite(error):
            bar = bar_of(run, metric)
            by_name[bar].append(error)
            by_name[f"{bar}: {' on '.join(_cell(run))}"].append(error)
    return {name: _statistics(np.array(values)) for name, values in sorted(by_name.items())}


def _statistics(errors: Any) -> dict[str, Any]:
    off, low, high = np.abs(np.expm1(errors)), *np.percentile(-errors, (10, 90))
    return {
        "n": len(errors), "median": round(float(np.median(off)), 4), "p90": round(float(np.percentile(off, 90)), 4),
        "bias": round(float(np.median(np.expm1(errors))), 4),
        "interval": [round(float(np.exp(low)), 4), round(float(np.exp(high)), 4)],
    }  # fmt: skip


def write(name: str, generation: str, constants: dict[str, float]) -> None:
    """Puts a generation's constants behind the mark of the stack's file, in the place of older ones."""
    path = Path(hardware_folder()) / "stacks" / f"{name}.toml"
    above, _, below = path.read_text(encoding="utf-8").partition(MARK)
    tables = {f"on.{generation}": STACK, f"serving.on.{generation}": SERVING}
    kept = [part for part in below.strip().split("\n\n") if part and part.partition("]")[0][1:] not in tables]
    for table, names in tables.items():
        lines = [
            f'{constant} = {{ value = {constants[constant]:.3g}, kind = "fitted", source = "published-serving-runs" }}'
            for constant in names
        ]
        kept.append("\n".join([f"[{table}]", *lines]))
    path.write_text(above.rstrip() + f"\n\n{MARK}\n\n" + "\n\n".join(sorted(kept)) + "\n", encoding="utf-8")


def write_centre(constants: dict[str, float]) -> None:
    """Puts the centre where stacks start from: it holds on generations of which an engine has no rows."""
    path = Path(hardware_folder()) / "stacks" / "serving.toml"
    text = path.read_text(encoding="utf-8")
    for name, value in constants.items():
        number = f'{name} = {{ value = {value:.3g}, kind = "fitted", source = "published-serving-runs" }}'
        text = re.sub(rf"^{name} = .*$", number, text, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
