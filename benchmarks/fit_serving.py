"""Fits the constants of serving stacks to published runs, and says how well they carry over to models that were left out.

    python benchmarks/fit_serving.py [--write] [--stack NAME] FILE.csv…

Logarithms of the constants are found by Gauss-Newton steps on the logarithms of measured over predicted
values: times between tokens, times to the first token (at a third of the weight), latencies and rates. Large residuals count with
a weight that falls (soft L1), constants that the rows do not tell stay at their priors. One fit per stack and generation of
accelerators; ``--write`` puts the results behind the line ``# -- fitted`` of the stack's file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.specs.device import Sourced
from planner.specs.library import hardware_folder
from planner.specs.stack import Stack, load_stack
from planner.validation.serving import contradicted, predict, served_runs
from planner.validation.serving_runs import ServedRun
from planner.validation.table import read_table

STACK = (
    "matmul_slowdown",
    "grouped_matmul_slowdown",
    "attention_slowdown",
    "stream_slowdown",
    "collective_slowdown",
)
SERVING = ("iteration_s", "sequence_s", "start_share", "call_share", "wave_share", "admission_s")
# Where the search begins and what it is drawn to; standard deviations of the logarithm.
PRIORS = {
    "matmul_slowdown": (0.9, 0.25), "grouped_matmul_slowdown": (0.9, 0.25), "attention_slowdown": (1.0, 0.3),
    "stream_slowdown": (1.0, 0.25), "collective_slowdown": (1.0, 0.35), "iteration_s": (1.5e-3, 0.7), "sequence_s": (8e-6, 0.7),
    "start_share": (0.6, 0.4), "call_share": (0.4, 0.6), "wave_share": (0.15, 1.0), "admission_s": (0.05, 1.0),
}  # fmt: skip
WEIGHTS = {"tpot": 1.0, "ttft": 0.35, "latency": 1.0, "output_tokens_per_s": 1.0}
MARK = "# -- fitted by benchmarks/fit_serving.py"
_ROUNDS, _STEP, _SCALE, _FEWEST = 3, 0.06, 0.1, 20
_PRIOR = 0.2  # typical residual: what a standard deviation of a constant weighs against a row's
Case = tuple[ServedRun, str, float]


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument("--stack")
    arguments.add_argument(
        "--errors", metavar="FILE.json", help="add errors of models left out, for accuracy_serving.py"
    )
    arguments.add_argument("--every", type=int, default=1, help="take every n-th row")
    arguments.add_argument("files", nargs="+", metavar="FILE.csv")
    options = arguments.parse_args()
    cases: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for path in options.files:
        runs = served_runs(read_table(path))
        apart = contradicted(runs)
        for run, measured in runs[:: options.every]:
            if run.row.row_id not in apart:
                key = run.stack.name, run.cluster.device.generation
                cases[key] += [(run, m, value) for m, value in measured.items() if m in WEIGHTS]
    for (name, generation), rows in sorted(cases.items()):
        if (options.stack is None or name == options.stack) and len(rows) >= _FEWEST:
            constants, left_out = _fit(load_stack(name), generation, rows)
            if options.errors:
                _add(Path(options.errors), name, generation, left_out)
            if options.write:
                write(name, generation, constants)


def _fit(
    stack: Stack, generation: str, cases: list[Case]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Constants of one stack on one generation, printed with in-sample errors and those of models left out."""
    names = [*STACK, *SERVING]
    prior = np.log([PRIORS[name][0] for name in names])
    deviation = np.array([PRIORS[name][1] for name in names])
    theta = prior.copy()
    measured = np.log([value for _, _, value in cases])
    weight = np.array([WEIGHTS[metric] for _, metric, _ in cases])
    alive = np.ones(len(cases), dtype=bool)
    for _ in range(_ROUNDS):
        now = _predicted(stack, generation, dict(zip(names, np.exp(theta), strict=True)), cases)
        alive = np.isfinite(now)
        slopes = np.zeros((len(cases), len(names)))
        for index in range(len(names)):
            moved = theta.copy()
            moved[index] += _STEP
            there = _predicted(stack, generation, dict(zip(names, np.exp(moved), strict=True)), cases)
            slopes[:, index] = np.where(alive, (there - now) / _STEP, 0.0)
        gap = np.where(alive, measured - now, 0.0)
        theta = theta + np.clip(_solve(slopes, gap, weight, theta - prior, deviation), -0.7, 0.7)
    final = _predicted(stack, generation, dict(zip(names, np.exp(theta), strict=True)), cases)
    print(f"{stack.name} on {generation}: {len(cases)} values")
    _report("  in sample", cases, final - measured)
    left_out = np.full(len(cases), np.nan)
    families = {_family(run) for run, _, _ in cases}
    for family in families if len(families) > 1 else ():
        others = np.array([_family(run) != family for run, _, _ in cases])
        step = _solve(slopes, gap, weight * others, theta - prior, deviation)
        linear = now + slopes @ step
        left_out = np.where(others, left_out, linear - measured)
    told = _report("  models left out", cases, left_out) if len(families) > 1 else {}
    constants = dict(zip(names, np.exp(theta), strict=True))
    print("  " + ", ".join(f"{name} {value:.3g}" for name, value in constants.items()))
    sys.stdout.flush()
    return constants, told


def _solve(slopes: Any, gap: Any, weight: Any, beyond: Any, deviation: Any) -> Any:
    """One reweighted, regularised least-squares step."""
    step = np.zeros(slopes.shape[1])
    keep = _PRIOR / deviation
    for _ in range(6):
        residual = gap - slopes @ step
        robust = weight / np.sqrt(np.sqrt(1.0 + (residual / _SCALE) ** 2))
        matrix = np.vstack([slopes * robust[:, None], np.diag(keep)])
        right = np.concatenate([gap * robust, -keep * beyond])
        step = np.linalg.lstsq(matrix, right, rcond=None)[0]
    return step


def _predicted(stack: Stack, generation: str, constants: dict[str, float], cases: list[Case]) -> Any:
    """Logarithms of predictions; not a number where there is none."""
    named = _with(stack, generation, constants)
    runs: dict[int, ServedRun] = {id(run): run for run, _, _ in cases}
    found = dict(zip(runs, predict(list(runs.values()), {stack.name: named}), strict=True))
    values = []
    for run, metric, _ in cases:
        result = found[id(run)]
        values.append(
            np.nan if isinstance(result, str) or metric not in result else np.log(max(result[metric], 1e-12))
        )
    return np.array(values)


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


def _family(run: ServedRun) -> tuple[int, int]:
    return run.model.hidden, run.model.n_layers


def _add(path: Path, name: str, generation: str, left_out: dict[str, dict[str, float]]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[f"{name} on {generation}"] = left_out
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


def _report(label: str, cases: list[Case], errors: Any) -> dict[str, dict[str, float]]:
    told = {}
    for metric in WEIGHTS:
        chosen = np.array([m == metric for _, m, _ in cases]) & np.isfinite(errors)
        if chosen.any():
            off = np.abs(np.expm1(errors[chosen]))
            bias = np.median(np.expm1(errors[chosen]))
            middle, high = np.median(off), np.percentile(off, 90)
            print(f"{label}: {metric} n={chosen.sum()} median {middle:.1%} 90th {high:.1%} bias {bias:+.1%}")
            told[metric] = {"n": int(chosen.sum()), "median": float(middle), "p90": float(high)}
    return told


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


if __name__ == "__main__":
    main()
