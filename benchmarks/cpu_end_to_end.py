"""Predicts the measured CPU runs from microbenchmarks alone, and prints predicted against measured.

``python benchmarks/cpu_end_to_end.py`` reads the profiles and the runs in ``examples/cpu`` and prints the tables of
``benchmarks/cpu_end_to_end.md``. Every run is priced by the planner's own estimate, and none of them was used in a fit; only the
last table is of stacks fitted to the runs of all *other* models.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from planner.calibration.robust_fit import Errors, errors_of
from planner.calibration.stack import MeasuredRun, fit_memory, fit_time, read_runs
from planner.specs.stack import Stack, load_stack

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "cpu"
GB = 1e9
KINDS = {"allocated": "allocated by PyTorch", "smi": "resident set of the process"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default=str(FOLDER / "runs.csv"))
    parser.add_argument("--device", default=str(FOLDER / "core.toml"))
    parser.add_argument("--stack", default=str(FOLDER / "stack.base.toml"))
    arguments = parser.parse_args()
    stack = load_stack(arguments.stack)
    runs = read_runs([arguments.runs], arguments.device).runs
    print_runs(runs, stack)
    print_errors(runs, stack)
    print_left_out(runs, stack)


def print_runs(runs: Sequence[MeasuredRun], stack: Stack) -> None:
    """One line per run: its time, and both of its peaks."""
    allocated = {run.row_id.removesuffix("-allocated"): run for run in runs if run.memory_kind == "allocated"}
    print(
        "| run | step s | predicted | error | allocated GB | predicted | error | resident GB | predicted | error |"
    )
    print("|---|" + "---:|" * 9)
    for run in runs:
        if run.step_time_s is not None:
            estimate = run.estimate(stack)
            pairs = [(run.step_time_s, estimate.step_time_s)]
            pairs += [(r.peak_bytes / GB, r.held_bytes(stack) / GB) for r in (allocated[run.row_id], run)]
            numbers = (
                f"{measured:.3f} | {found:.3f} | {found / measured - 1:+.1%}" for measured, found in pairs
            )
            print(f"| {run.row_id.removeprefix('cpu-')} | {' | '.join(numbers)} |")


def print_errors(runs: Sequence[MeasuredRun], stack: Stack) -> None:
    """Errors of all runs, without any fit to them."""
    print("\n| predicted from microbenchmarks alone | n | median | mean | 90th | bias |\n|---|" + "---:|" * 5)
    for processes in (1, 2):
        timed = [run for run in runs if run.step_time_s is not None and run.job.cluster.devices == processes]
        if timed:
            found = np.array([run.estimate(stack).step_time_s for run in timed])
            print_line(
                f"step time, {processes} process{'es' * (processes > 1)}", errors_of(found, steps(timed))
            )
    for kind, words in KINDS.items():
        mine = [run for run in runs if run.memory_kind == kind]
        found = np.array([run.held_bytes(stack) for run in mine])
        print_line(f"peak memory, {words}", errors_of(found, np.array([run.peak_bytes for run in mine])))


def print_left_out(runs: Sequence[MeasuredRun], stack: Stack) -> None:
    """Errors of runs under a stack that was fitted to the other models' runs."""
    print("\n| stack fitted to the other models | n | median | mean | 90th | bias |\n|---|" + "---:|" * 5)
    timed = [run for run in runs if run.step_time_s is not None]
    folds = len({run.model for run in runs})
    for words, (_, found) in (
        ("step time", fit_time(stack, timed, folds=folds)),
        ("resident set", fit_memory(stack, timed, folds=folds)),
    ):
        constants = ", ".join(f"{c.name} {c.value:.3g} ({c.low:.3g} to {c.high:.3g})" for c in found.fitted)
        print_line(f"{words}: {constants or 'too few rows'}", found.left_out)


def steps(runs: Sequence[MeasuredRun]) -> np.ndarray:
    return np.array([run.step_time_s for run in runs])


def print_line(words: str, errors: Errors) -> None:
    shares = (errors.median, errors.mean, errors.p90)
    print(f"| {words} | {errors.n} | {' | '.join(f'{x:.1%}' for x in shares)} | {errors.bias:+.1%} |")


if __name__ == "__main__":
    main()
