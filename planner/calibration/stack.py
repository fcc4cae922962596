"""Calibrates a software stack: what overlap costs, and the memory beside the model's, from training runs that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.calibration.constants import changed, constants_of
from planner.calibration.robust_fit import Constant, Fit, Kept, errors_of, fit
from planner.errors import PlannerError, Problem, SpecError
from planner.plans.assemble import Assembly
from planner.plans.plan import Estimate
from planner.solve.named import examine
from planner.specs.problem import Problem as Job
from planner.specs.stack import Stack
from planner.validation.measured import asks_for, peak_memory_bytes, tokens_per_s_per_device
from planner.validation.plans import run_of
from planner.validation.table import Row, Unsupported, read_table
from planner.validation.training import MEMORY_KINDS, memory_reading, predicted_run

__all__ = [
    "MEMORY_CONSTANTS",
    "TIME_CONSTANTS",
    "MeasuredRun",
    "fit_constants",
    "fit_memory",
    "fit_time",
    "read_runs",
]

Array: TypeAlias = NDArray[np.float64]

TIME_CONSTANTS = (
    ("matmul_slowdown", 0.2, 10.0),
    ("stream_slowdown", 0.2, 10.0),
    ("collective_slowdown", 0.1, 10.0),
    ("attention_slowdown", 0.2, 10.0),
    ("overlap_slowdown", 1.0, 3.0),
    ("dispatch_s", 1e-8, 1e-3),
)
MEMORY_CONSTANTS = (
    ("framework_bytes", 1e6, 2e10),
    ("fragmentation", 1e-3, 1.0),
    ("communicator_bytes", 1e5, 4e9),
)
"""Constants of a stack that runs determine, the most telling first. The bucket size is a setting: look it up."""


_DEFAULTS = {
    "(loss)": "loss_kernel",
    "(gradients)": "gradient_dtype",
}  # of the validation, and the knobs that they set
_ROUNDS, _SETTLED = (
    4,
    0.005,
)  # linearisations at most; relative move of all constants below which there is no other
_STEP = 1.05  # by which a constant is moved to see its slope
_LEAST = 0.05  # of a prediction that the linear form keeps


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A training run: the job with the plan that was run, and what was measured of it (None: nothing).

    ``unsaid`` are knobs that the row leaves open: they have the default of its framework.
    """

    row_id: str
    model: str
    job: Job
    step_time_s: float | None
    peak_bytes: float | None
    memory_kind: str
    unsaid: frozenset[str] = frozenset()

    def priced(self, stack: Stack) -> Assembly:
        """The run's plan under a stack, whose choices stand where the row says nothing."""
        fixed = {k: v for k, v in self.job.fixed.items() if not (k in self.unsaid and k in stack.knobs)}
        return examine(replace(self.job, stack=stack, fixed=fixed))

    def estimate(self, stack: Stack) -> Estimate:
        """The planner's estimate of the run under a stack."""
        return self.priced(stack).plan.estimate

    def held_bytes(self, stack: Stack) -> float:
        """Predicted reading of the run's meter under a stack, as ``planner validate`` takes it."""
        return memory_reading(self.priced(stack), self.memory_kind).n_bytes


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs that can be priced, and why the other rows cannot, by row."""

    runs: tuple[MeasuredRun, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_runs(paths: Sequence[str | Path], device: str | None = None) -> Runs:
    """The runs in training CSV files.

    Args:
        paths: the files.
        device: profile (name or file) that takes the place of the rows' accelerator; None leaves it.

    Raises:
        SpecError: a file cannot be read, is no training table, or no row of all can be priced.
    """
    found: list[MeasuredRun] = []
    left_out: dict[str, str] = {}
    for path in paths:
        table = read_table(path)
        if table.kind != "training":
            expected = "a training table: n_layers, hidden, n_heads, seq_len, … as `planner validate` reads"
            raise SpecError(Problem(str(path), f"holds {table.kind} rows", expected))
        for row in table.rows:
            if device is not None:
                row = replace(row, cells={**row.cells, "accelerator": device})
            try:
                found.append(_run(row))
            except Unsupported as error:
                left_out[row.row_id] = str(error)
            except PlannerError as error:
                left_out[row.row_id] = "; ".join(problem.found for problem in error.problems)
    if not found:
        reasons = "; ".join(dict.fromkeys(left_out.values())) or "no rows"
        where = ", ".join(str(path) for path in paths)
        raise SpecError(
            Problem(where, f"no run can be priced: {reasons[:300]}", "runs that the planner can describe")
        )
    return Runs(tuple(found), left_out)


def fit_time(stack: Stack, runs: Sequence[MeasuredRun], *, folds: int = 5) -> tuple[Stack, Fit]:
    """The stack with the constants that step times determine, and the fit; runs of one model are left out together.

    Raises:
        SpecError: no run has a step time.
    """
    timed = [run for run in runs if run.step_time_s is not None]

    def seconds(candidate: Stack) -> Array:
        return np.array([run.estimate(candidate).step_time_s for run in timed])

    times = [run.step_time_s for run in timed if run.step_time_s is not None]
    start, bounds, apart = _start(stack, timed, TIME_CONSTANTS)
    fitted, found = fit_constants(start, [run.model for run in timed], times, seconds, bounds, folds)
    return fitted, replace(found, kept=(*found.kept, *apart))


def fit_memory(stack: Stack, runs: Sequence[MeasuredRun], *, folds: int = 5) -> tuple[Stack, Fit]:
    """The stack with the constants that peak memory determines, and the fit; runs of one model are left out together.

    Raises:
        SpecError: no run has a peak memory.
    """
    measured = [run for run in runs if run.peak_bytes is not None]

    def held(candidate: Stack) -> Array:
        return np.array([run.held_bytes(candidate) for run in measured])

    peaks = [run.peak_bytes for run in measured if run.peak_bytes is not None]
    start, bounds, apart = _start(stack, measured, MEMORY_CONSTANTS)
    fitted, found = fit_constants(start, [run.model for run in measured], peaks, held, bounds, folds)
    return fitted, replace(found, kept=(*found.kept, *apart))


def _start(
    stack: Stack, runs: Sequence[MeasuredRun], bounds: Sequence[tuple[str, float, float]]
) -> tuple[Stack, Sequence[tuple[str, float, float]], tuple[Kept, ...]]:
    """Where a fit starts: the stack on the generation of all runs, and the bounds of all constants.

    Of several generations: the stack itself, and the bounds of what it has in common for them; the others are kept.
    """
    generations = sorted({run.job.cluster.device.generation for run in runs})
    if len(generations) == 1:
        return stack.on_generation(generations[0]), bounds, ()
    own = {name: generation for generation in generations for name in stack.on.get(generation, {})}
    apart = tuple(
        Kept(
            name,
            float(getattr(stack, name)),
            f"the base has another on {own[name]}: fit one generation alone",
        )
        for name, _, _ in bounds
        if name in own
    )
    return stack, [bound for bound in bounds if bound[0] not in own], apart


def fit_constants(
    stack: Stack,
    groups: Sequence[str],
    measured: Sequence[float],
    predict: Callable[[Stack], Array],
    bounds: Sequence[tuple[str, float, float]],
    folds: int,
    weights: Array | None = None,
) -> tuple[Stack, Fit]:
    """The stack with fitted constants, and the fit.

    Args:
        stack: where constants start.
        groups: per measurement, what it is left out together with.
        measured: positive values.
        predict: the planner's value of each under a stack.
        bounds: constants (path, least, most), the most telling first.
        folds: parts for the left-out error.
        weights: per measurement; None: all alike.

    Raises:
        SpecError: nothing is measured.
    """
    if not measured:
        raise SpecError(Problem("measurements", "none can be fitted to", "rows with a time or a memory"))
    constants = constants_of(stack, bounds)
    priors = {constant.name: constant.prior for constant in constants}
    values = priors
    for _ in range(_ROUNDS):
        near = _linear(lambda new: predict(changed(stack, new)), constants, values)
        found = fit(near, measured, constants, groups, folds=folds, weights=weights)
        moved = max((abs(found.values[name] / old - 1.0) for name, old in values.items()), default=0.0)
        values = found.values
        if moved < _SETTLED:
            break
    fitted = changed(stack, {constant.name: constant.value for constant in found.fitted})
    truth = np.asarray(measured, dtype=np.float64)
    predicted = predict(fitted)
    before = errors_of(predict(changed(stack, priors)), truth)
    return fitted, replace(found, before=before, within=errors_of(predicted, truth), predicted=predicted)


def _linear(
    predict: Callable[[Mapping[str, float]], Array], constants: Sequence[Constant], at: Mapping[str, float]
) -> Callable[[Mapping[str, float]], Array]:
    """Predictions near some values as a sum over the constants: exact where times and bytes add up, as most of a ledger does.

    An estimate takes milliseconds, and a fit with its left-out parts asks for hundreds per run.
    """
    base = predict(at)
    slopes = {}
    for constant in constants:
        name, here = constant.name, at[constant.name]
        there = here * _STEP if here * _STEP <= constant.high else here / _STEP
        slopes[name] = (predict({**at, name: there}) - base) / (there - here)

    def near(values: Mapping[str, float]) -> Array:
        total: Array = base + sum(slope * (values[name] - at[name]) for name, slope in slopes.items())
        return np.maximum(total, _LEAST * base)

    return near


def _run(row: Row) -> MeasuredRun:
    """The run of a row, with what ``score_for`` says that it may be held to."""
    asked = asks_for(row)
    timed, weighed = "tokens_per_s_per_device" in asked, "peak_memory" in asked
    if not (timed or weighed):
        raise Unsupported("score_for names neither time nor memory")
    kind = row.text("peak_memory_kind")
    if kind not in MEMORY_KINDS:
        raise Unsupported(f"peak_memory_kind is {kind!r}, none of {', '.join(filter(None, MEMORY_KINDS))}")
    run = predicted_run(run_of(row))[0]
    return MeasuredRun(
        row.row_id, f"{row.text('model')} {row.text('n_layers')} x {row.text('hidden')}", run.problem,
        _step_time_s(row, run.problem) if timed else None, _peak_bytes(row) if weighed else None, kind,
        frozenset(knob for name, knob in _DEFAULTS.items() if name in run.defaults),
    )  # fmt: skip


def _step_time_s(row: Row, job: Job) -> float | None:
    device, devices = job.cluster.device, job.cluster.devices
    try:
        rate = tokens_per_s_per_device(
            row, job.model, job.workload, devices, device, str(job.fixed["precision"])
        )
    except Unsupported:
        return None
    return job.workload.tokens_per_step / (rate * devices)


def _peak_bytes(row: Row) -> float | None:
    try:
        return peak_memory_bytes(row)
    except Unsupported:
        return None
