"""Calibrates a serving stack: what an engine's host and kernels cost, from deployments that were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.calibration.robust_fit import Fit
from planner.calibration.stack import fit_constants
from planner.errors import Problem, SpecError
from planner.specs.stack import Stack, load_stack
from planner.validation.serving import predict, served_runs
from planner.validation.serving_exclusions import contradicted
from planner.validation.serving_runs import ServedRun, served_run
from planner.validation.table import Row, Unsupported, read_table

__all__ = ["SERVING_CONSTANTS", "ServedRuns", "fit_serving", "read_served"]

Array: TypeAlias = NDArray[np.float64]

SERVING_CONSTANTS = (
    ("serving.iteration_s", 1e-5, 0.1),
    ("stream_slowdown", 0.2, 10.0),
    ("matmul_slowdown", 0.2, 10.0),
    ("serving.sequence_s", 1e-8, 1e-2),
    ("collective_slowdown", 0.1, 10.0),
    ("attention_slowdown", 0.2, 10.0),
    ("serving.admission_s", 1e-4, 10.0),
    ("serving.prompt_slowdown", 0.2, 10.0),
    ("grouped_matmul_slowdown", 0.2, 10.0),
    ("dispatch_s", 1e-8, 1e-3),
)
"""Constants of a stack that deployments determine, the most telling first."""
_WEIGHTS: Mapping[str, float] = {"tpot": 1.0, "latency": 1.0, "output_tokens_per_s": 1.0, "ttft": 0.35}
# Times to the first token repeat to a third of what times between tokens do: they depend on how clients start.


@dataclass(frozen=True, slots=True)
class ServedRuns:
    """Deployments that can be priced, what each measured by metric, and why the other rows cannot be, by row."""

    runs: tuple[tuple[ServedRun, Mapping[str, float]], ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def generation(self) -> str:
        """The generation of their devices."""
        return self.runs[0][0].cluster.device.generation

    @property
    def engine(self) -> str:
        """The stack of their engine."""
        return self.runs[0][0].stack.name


def read_served(paths: Sequence[str | Path], device: str | None = None) -> ServedRuns:
    """The deployments in CSV files of serving runs, of one engine on one generation of devices.

    Args:
        paths: the files.
        device: profile (name or file) that takes the place of the rows' accelerator; None leaves it.

    Raises:
        SpecError: a file cannot be read, no row of all can be priced, or engines or generations differ.
    """
    found: list[tuple[ServedRun, Mapping[str, float]]] = []
    left_out: dict[str, str] = {}
    for path in paths:
        table = read_table(path)
        if device is not None:
            rows = tuple(replace(row, cells={**row.cells, "accelerator": device}) for row in table.rows)
            table = replace(table, rows=rows)
        runs = served_runs(table)
        apart = contradicted(runs)
        told = {run.row.row_id for run, _ in runs}
        left_out |= {row.row_id: _why(row) for row in table.rows if row.row_id not in told}
        for run, measured in runs:
            if run.row.row_id in apart:
                left_out[run.row.row_id] = "was measured again with another result"
            elif run.may_speculate:
                left_out[run.row.row_id] = "does not say whether tokens were drafted"
            else:
                found.append((run, {name: value for name, value in measured.items() if name in _WEIGHTS}))
    where = ", ".join(str(path) for path in paths)
    if not found:
        reasons = "; ".join(dict.fromkeys(left_out.values())) or "no rows"
        expected = "runs that `planner validate` can price"
        raise SpecError(Problem(where, f"no run can be priced: {reasons[:300]}", expected))
    for what, names in (
        ("engines", {run.stack.name for run, _ in found}),
        ("generations of devices", {run.cluster.device.generation for run, _ in found}),
    ):
        if len(names) > 1:
            raise SpecError(
                Problem(where, f"{what}: {', '.join(sorted(names))}", "one; a stack is fitted to each")
            )
    return ServedRuns(tuple(found), left_out)


def fit_serving(base: str, served: ServedRuns, *, folds: int = 5) -> tuple[Stack, Fit]:
    """The stack with the constants that the runs determine, and the fit; runs of one model are left out together.

    Args:
        base: stack (name or file) with all that is not fitted.
        served: the runs.
        folds: parts for the left-out error.

    Raises:
        SpecError: there is no such stack, or it serves nothing.
    """
    start = load_stack(base).on_generation(served.generation)
    if start.serving is None:
        raise SpecError(
            Problem(f"--base {base}", "is a stack that trains", f"one that serves, such as {served.engine}")
        )
    runs = [replace(run, stack=start) for run, _ in served.runs]
    known = _predicted(runs, start)
    kept = [
        (at, metric, value)
        for at, (_, measured) in enumerate(served.runs)
        for metric, value in measured.items()
        if metric in known[at]
    ]
    if not kept:
        raise SpecError(Problem("measurements", "none can be predicted", "times or rates of deployments"))

    def seconds(candidate: Stack) -> Array:
        found = _predicted(runs, candidate)
        return np.array([found[at][metric] for at, metric, _ in kept])

    groups = [f"{runs[at].model.hidden} x {runs[at].model.n_layers}" for at, _, _ in kept]
    weights = np.array([_WEIGHTS[metric] for _, metric, _ in kept])
    return fit_constants(
        start, groups, [value for _, _, value in kept], seconds, SERVING_CONSTANTS, folds, weights
    )


def _why(row: Row) -> str:
    """Why a row is no deployment that can be priced."""
    try:
        served_run(row, Counter())
    except Unsupported as error:
        return str(error)
    return "nothing is measured, or it is of quality C"


def _predicted(runs: Sequence[ServedRun], stack: Stack) -> list[dict[str, float]]:
    """Metrics of every run under a stack; none where it cannot be run."""
    found = predict(runs, {runs[0].stack.name: stack})
    return [{} if isinstance(one, str) else one for one in found]
