"""Fits the constants of serving stacks to published runs, and says how well they carry over to models that were left out.

    python benchmarks/fit_serving.py [--write] [--errors FILE.json] [--residuals FILE.json] [--rounds N] FILE.csv…

One fit of all stacks: logarithms of the constants are a common centre, which is drawn to physical expectations, and a deviation
per stack and generation of accelerators, drawn to zero, so that a stack with few models leans on the others: Gauss-Newton
steps on the logarithms of measured over predicted values: times between tokens, times to the first token (at less
weight), latencies and rates. Large residuals count with a weight that falls (soft L1); a model counts as at most so many
rows, since what its rows miss they mostly miss together. A model is left out by solving the last step again without
its rows, on every stack, and predicting them; so is a source. ``--write`` puts the results behind the line ``# -- fitted`` of the
stacks' files; a stack whose file has none takes the constants of the one that it extends, but for those that it states.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from planner.specs.device import Sourced
from planner.specs.library import hardware_folder
from planner.specs.stack import Stack, load_stack
from planner.uncertainty.serving import novelty_of
from planner.validation.benchmark_suites import suite_of
from planner.validation.serving import predict, served_runs
from planner.validation.serving_bars import QUANTITY_OF, bar_of, kind_of_value, load_of_run
from planner.validation.serving_exclusions import contradicted, excluded, repeated
from planner.validation.serving_runs import ServedRun
from planner.validation.serving_spreads import ServingResidual, fit_serving_spreads, held_of_sources
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
    "admission_token_s",
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
    "admission_token_s": (
        4e-6,
        0.7,
        0.4,
    ),  # a tokenizer's thread turns some 1 to 2 MB of text a second into tokens of 4 bytes
}
NAMES = (*STACK, *SERVING)
WEIGHTS = {"tpot": 1.0, "ttft": 0.7, "latency": 1.0, "output_tokens_per_s": 1.0}
MARK = "# -- fitted by benchmarks/fit_serving.py"
_STEP, _LONGEST, _SCALE, _FEWEST = 0.06, 0.7, 0.1, 20
_RESIDUAL = 0.2  # typical: what a standard deviation of a constant weighs against a row's
_ROWS_OF_A_MODEL = 40.0
_HELD_OUT = Path(__file__).parent / "held_out" / "serving"
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
    by_model: Any  # the same with constants from the other models' rows
    by_source: Any  # and from the other sources' rows


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument(
        "--errors", metavar="FILE.json", help="errors of models and sources left out, for accuracy_serving.py"
    )
    arguments.add_argument(
        "--residuals",
        metavar="FILE.json",
        help="write intervals, for planner/uncertainty/serving_residuals.json",
    )
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("files", nargs="+", metavar="FILE.csv")
    options = arguments.parse_args()
    found = fit(read_cases(options.files), options.rounds)
    rows = residuals(found, read_cases(sorted(str(path) for path in _HELD_OUT.glob("*.csv"))))
    listed = Counter(
        first for path in options.files for first in repeated(served_runs(read_table(path))).values()
    )
    told = left_out(found, rows, listed)
    whole = statistics(found.cases, found.errors, source_of, listed)
    for title, errors in (
        ("in sample", whole),
        ("models left out", told["models"]),
        ("sources left out", told["sources"]),
    ):
        print(title)
        for name, v in errors.items():
            print(f"  {name}: n={v['n']} median {v['median']:.1%} 90th {v['p90']:.1%} bias {v['bias']:+.1%}")
    print("intervals of sources left out", told["intervals"])
    counts = Counter(_cell(run) for run, _, _ in found.cases)
    for cell, logarithms in zip(found.cells, found.theta, strict=True):
        constants = dict(zip(NAMES, np.exp(logarithms), strict=True))
        print(*cell, counts[cell], ", ".join(f"{name} {value:.3g}" for name, value in constants.items()))
        if options.write and counts[cell] >= _FEWEST:
            write(*cell, constants)
    constants = dict(zip(NAMES, np.exp(found.centre), strict=True))
    print("centre", ", ".join(f"{name} {value:.3g}" for name, value in constants.items()))
    if options.write:
        write_centre(constants)
    for path, document in ((options.residuals, intervals(rows)), (options.errors, told)):
        if path:
            Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_cases(files: list[str]) -> list[Case]:
    """What the files measured and the planner predicts."""
    cases: list[Case] = []
    for path in files:
        runs = served_runs(read_table(path))
        apart, again = contradicted(runs), repeated(runs)
        for run, measured in runs:
            cases += [
                (run, metric, value)
                for metric, value in measured.items()
                if metric in WEIGHTS
                and not excluded(run, metric, measured, run.row.row_id in apart, run.row.row_id in again)
            ]
    return cases


def fit(cases: list[Case], rounds: int) -> Fit:
    """Constants of all stacks, and errors with and without the rows of each model, and of each source."""
    cells = sorted({_cell(run) for run, _, _ in cases})
    at = np.array([cells.index(_cell(run)) for run, _, _ in cases])
    theta = np.array([_now(load_stack(name), generation) for name, generation in cells])
    measured = np.log([value for _, _, value in cases])
    families = [_family(run) for run, _, _ in cases]
    weight = _weights(cases, at, families)
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
        theta = before + np.clip(found - before, -_LONGEST, _LONGEST)

    def without(groups: list[Any]) -> Any:
        """Errors of every group of rows, with constants from the others."""
        errors = np.full(len(cases), np.nan)
        for group in dict.fromkeys(groups):
            own = np.array([other == group for other in groups])
            others, _ = _solve(slopes, goal, weight * told * ~own, at, len(cells))
            moved = before + np.clip(others - before, -_LONGEST, _LONGEST)
            errors[own] = _predicted(cells, moved, [cases[i] for i in np.flatnonzero(own)]) - measured[own]
        return errors

    by_model = without(families)
    on_engine = defaultdict(set)  # a model alone on its engine leaves nothing to fit that engine to
    for (name, _), family in zip((_cell(run) for run, _, _ in cases), families, strict=True):
        on_engine[name].add(family)
    by_model[[len(on_engine[_cell(run)[0]]) == 1 for run, _, _ in cases]] = np.nan
    errors = _predicted(cells, theta, cases) - measured
    by_source = without([source_of(run) for run, _, _ in cases])
    return Fit(cases, cells, theta, centre, errors, by_model, by_source)


def _weights(cases: list[Case], at: Any, families: list[Any]) -> Any:
    """What a row counts; nothing where a stack has too few on a generation for constants of its own."""
    rows, of_cell = Counter(zip(at.tolist(), families, strict=True)), Counter(at.tolist())
    return np.array(
        [
            WEIGHTS[metric]
            * min(1.0, _ROWS_OF_A_MODEL / rows[cell, family]) ** 0.5
            * (of_cell[cell] >= _FEWEST)
            * (not (run.compiles and metric == "ttft"))  # no constant is of that
            for (run, metric, _), cell, family in zip(cases, at.tolist(), families, strict=True)
        ]
    )


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
        return run.experts
    if name == "collective_slowdown":
        return math.prod(run.degrees[:3]) > 1
    if name == "dispatch_s":  # where graphs hide it, it sets no pace
        assert run.stack.serving is not None
        return float(run.stack.serving.graph_sequences) == 0.0
    return not name.startswith("admission") or run.driver in ("concurrency", "pools", "rate")


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
    stacks = {run.stack.name: run.stack for run, _, _ in cases}
    for name in stacks:
        for (fitted, generation), logarithms in zip(cells, theta, strict=True):
            if fitted == _fitted_with(name):
                constants = dict(zip(NAMES, np.exp(logarithms), strict=True))
                stacks[name] = _with(stacks[name], generation, constants)
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
    stated = _stated(stack.name)
    number = {
        name: Sourced(float(value), "fitted", "published-serving-runs")
        for name, value in constants.items()
        if name not in stated
    }
    assert stack.serving is not None
    on, served = (
        {**old, generation: {**old.get(generation, {}), **{n: number[n] for n in names if n in number}}}
        for old, names in ((stack.on, STACK), (stack.serving.on, SERVING))
    )
    return replace(stack, on=on, serving=replace(stack.serving, on=served))


def _cell(run: ServedRun) -> Cell:
    return _fitted_with(run.stack.name), run.cluster.device.generation


@cache
def _fitted_with(name: str) -> str:
    """The stack whose fitted constants one takes: its own, or where its file has none, those of the one that it extends."""
    text = _file(name).read_text(encoding="utf-8")
    above = tomllib.loads(text).get("extends")
    return name if MARK in text or above is None else _fitted_with(above)


@cache
def _stated(name: str) -> frozenset[str]:
    """Constants that a stack without fitted ones states itself."""
    if name == _fitted_with(name):
        return frozenset()
    table = tomllib.loads(_file(name).read_text(encoding="utf-8"))
    return frozenset({*table, *table.get("serving", {})} & set(NAMES)) | _stated(table["extends"])


def _file(name: str) -> Path:
    return Path(hardware_folder()) / "stacks" / f"{name}.toml"


def source_of(run: ServedRun) -> str:
    """Who measured a run: its benchmark where a table gathers several, else the repository that publishes it."""
    suite = suite_of(run.row)
    return suite.name if suite.upstream else re.split(r"[@ ]", run.row.text("source"))[0]


def _family(run: ServedRun) -> tuple[int, int]:
    """Models of one shape are one model."""
    return run.model.hidden, run.model.n_layers


def residuals(found: Fit, held_out: list[Case]) -> list[ServingResidual]:
    """What intervals rest on: runs that constants were fitted to, left out, and others, which have them all."""
    published = [
        ServingResidual(
            QUANTITY_OF[metric], kind_of_value(run, metric), source_of(run), *(-float(error) for error in errors),
            load=load_of_run(run),
        )
        for (run, metric, _), *errors in zip(found.cases, found.by_model, found.by_source, strict=True)
    ]  # fmt: skip
    new = sorted({_cell(run) for run, _, _ in held_out} - set(found.cells))
    theta = np.vstack([found.theta, np.tile(found.centre, (len(new), 1))])
    predicted = _predicted([*found.cells, *new], theta, held_out)
    return published + [
        ServingResidual(
            QUANTITY_OF[metric], kind_of_value(run, metric), Path(run.row.file).stem, math.nan,
            math.log(value) - float(seen), load_of_run(run), novelty_of(run.stack, run.cluster.device), held_out=True,
        )
        for (run, metric, value), seen in zip(held_out, predicted, strict=True)
    ]  # fmt: skip


def intervals(rows: list[ServingResidual]) -> dict[str, Any]:
    """The document that ``planner serve`` reads its intervals from."""
    about = (
        "log(measured/predicted) of published serving runs: half-widths that hold 80 % of runs of models left out "
        "(within, by kind), and what sources that no constant knows need beside it (between, by load and what is new): "
        "benchmarks/fit_serving.py --residuals writes this file."
    )
    return {"about": about, **_rounded(fit_serving_spreads(rows))}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def left_out(found: Fit, rows: list[ServingResidual], listed: Counter[str]) -> dict[str, Any]:
    """Errors of models and of sources left out, by what they are held to, and whether intervals hold the latter."""
    return {
        "models": statistics(found.cases, found.by_model, lambda run: " on ".join(_cell(run)), listed),
        "sources": statistics(found.cases, found.by_source, source_of, listed),
        "intervals": _rounded(held_of_sources(rows)),
    }


def statistics(
    cases: list[Case], errors: Any, part: Callable[[ServedRun], str], listed: Counter[str]
) -> dict[str, dict[str, Any]]:
    """Errors by what they are held to, of it without runs that may have waited for compilation, as often as rows are ``listed``
    again, and by parts of it."""
    by_name: dict[str, list[float]] = defaultdict(list)
    twice = {bar_of(run, metric) for run, metric, _ in cases if listed[run.row.row_id]}
    cold = {bar_of(run, metric) for run, metric, _ in cases if run.compiles and metric == "ttft"}
    for (run, metric, _), error in zip(cases, errors, strict=True):
        if np.isfinite(error):
            bar = bar_of(run, metric)
            by_name[bar].append(error)
            if bar in cold and not run.compiles:
                by_name[f"{bar}, compiled before"].append(error)
            if bar in twice:
                by_name[f"{bar}, every listing"] += [error] * (1 + listed[run.row.row_id])
            by_name[f"{bar}: {part(run)}"].append(error)
    return {name: _statistics(np.array(values)) for name, values in sorted(by_name.items())}


def _statistics(errors: Any) -> dict[str, Any]:
    off = np.abs(np.expm1(errors))
    return {
        "n": len(errors), "median": round(float(np.median(off)), 4), "p90": round(float(np.percentile(off, 90)), 4),
        "bias": round(float(np.median(np.expm1(errors))), 4),
    }  # fmt: skip


def write(name: str, generation: str, constants: dict[str, float]) -> None:
    """Puts a generation's constants behind the mark of the stack's file, in the place of older ones."""
    path = _file(name)
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
    path = _file("serving")
    text = path.read_text(encoding="utf-8")
    for name, value in constants.items():
        number = f'{name} = {{ value = {value:.3g}, kind = "fitted", source = "published-serving-runs" }}'
        text = re.sub(rf"^{name} = .*$", number, text, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
