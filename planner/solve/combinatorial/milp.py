"""One adapter for mixed-integer programs: a sparse program in, a solution out, whichever backend solves it.

Backends: ``scipy`` (HiGHS inside :func:`scipy.optimize.milp`) and ``pulp`` (HiGHS through highspy where it is installed,
else the CBC that PuLP brings). Both are imported when first used.

Solvers call answers feasible and optimal up to absolute tolerances (HiGHS: 1e-6), which mean nothing for costs in seconds
and sizes in bytes. So costs and rows are scaled before a solve, integers are rounded after it, and the objective and the
rows of whole numbers are evaluated again with the caller's own numbers. An answer that lives on the tolerance of such a
row is not accepted: the program is solved once more with the row narrowed, and the bound remains that of the first solve.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import Problem, SolverError
from planner.solve.combinatorial.certificate import Clock

__all__ = ["BACKENDS", "MilpSolution", "Program", "solve"]

Floats: TypeAlias = NDArray[np.float64]
Index: TypeAlias = NDArray[np.intp]

BACKENDS = ("scipy", "pulp")
_SCALE = 1e6  # the largest cost after scaling: absolute tolerances of 1e-6 are then 1e-12 of it
_EXACT = 1e-9  # rows of whole numbers hold to this, relative to their largest coefficient
_NARROWING = (
    1e-5  # of a row that an answer has stretched, relative to the same: ten times the solvers' own tolerance
)


class Program:
    """Minimise ``cost·x`` subject to ``low <= A·x <= high`` and bounds on x, some of whose entries are whole numbers.

    >>> program = Program()
    >>> x = program.variables([-3.0, -2.0], upper=4.0, integer=True)
    >>> program.constrain([x], [[2.0, 1.0]], high=5.0)
    >>> solve(program).values.tolist()
    [1.0, 3.0]
    """

    def __init__(self) -> None:
        self._cost: list[Floats] = []
        self._upper: list[Floats] = []
        self._integer: list[NDArray[np.bool_]] = []
        self._rows: list[Index] = []
        self._columns: list[Index] = []
        self._values: list[Floats] = []
        self._low: list[Floats] = []
        self._high: list[Floats] = []
        self.n_variables = 0
        self.n_rows = 0

    def variables(self, cost: ArrayLike, *, upper: ArrayLike = 1.0, integer: bool = False) -> Index:
        """Adds variables from 0 to ``upper`` with these costs; returns their columns, in the shape of ``cost``."""
        costs = np.asarray(cost, dtype=np.float64)
        columns = self.n_variables + np.arange(costs.size).reshape(costs.shape)
        self._cost.append(costs.ravel())
        self._upper.append(np.broadcast_to(np.asarray(upper, dtype=np.float64), costs.shape).ravel())
        self._integer.append(np.full(costs.size, integer))
        self.n_variables += costs.size
        return columns

    def constrain(
        self,
        columns: Sequence[Any] | Index,
        values: Any,
        *,
        low: ArrayLike = -np.inf,
        high: ArrayLike = np.inf,
    ) -> None:
        """Adds one row per line of ``columns`` (rows, terms), with ``values`` as coefficients (broadcast over them)."""
        where = np.atleast_2d(np.asarray(columns, dtype=np.intp))
        lines = len(where)
        self._columns.append(where.ravel())
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float64), where.shape).ravel())
        self._rows.append(np.repeat(self.n_rows + np.arange(lines), where.shape[1]))
        for limits, limit in ((self._low, low), (self._high, high)):
            limits.append(np.broadcast_to(np.asarray(limit, dtype=np.float64), (lines,)).ravel())
        self.n_rows += lines

    def arrays(self) -> _Arrays:
        """The program as arrays."""
        return _Arrays(
            _joined(self._cost), _joined(self._upper), np.concatenate(self._integer or [np.zeros(0, dtype=bool)]),
            _joined(self._rows).astype(np.intp), _joined(self._columns).astype(np.intp), _joined(self._values),
            _joined(self._low), _joined(self._high),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class MilpSolution:
    """What a solver found.

    Attributes:
        status: ``optimal``; ``feasible`` (stopped with an answer); ``infeasible``; ``unknown`` (stopped before the first answer).
        values: of the variables, whole where they have to be; empty without an answer.
        objective: ``cost·values``, infinite without an answer.
        bound: no answer costs less.
        solver: backend and solver.
        wall_s: seconds in the solver.
    """

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    values: Floats
    objective: float
    bound: float
    solver: str
    wall_s: float

    @property
    def found(self) -> bool:
        """Whether there is an answer."""
        return self.status in ("optimal", "feasible")


def solve(
    program: Program, *, backend: str = "scipy", time_limit_s: float | None = None, gap: float = 0.0
) -> MilpSolution:
    """Solves a program to a relative gap, or until the time is up.

    Args:
        program: what to minimise.
        backend: one of :data:`BACKENDS`.
        time_limit_s: None: as long as it takes.
        gap: relative; 0 proves the optimum.

    Raises:
        SolverError: the backend is unknown, cannot be loaded, or gives up for another reason than time.
    """
    if backend not in BACKENDS:
        raise SolverError(Problem("solver", repr(backend), f"one of {', '.join(BACKENDS)}"))
    clock = Clock(time_limit_s)
    run = _scipy if backend == "scipy" else _pulp
    arrays = program.arrays()
    if not len(arrays.cost):
        return MilpSolution("optimal", np.zeros(0), 0.0, 0.0, backend, 0.0)
    scaled = arrays.scaled()
    found = run(scaled, clock.left_s, gap)
    bound = found.bound / scaled.cost_scale
    stretched = arrays.broken(found.values) if found.found else np.zeros(0, dtype=bool)
    if stretched.any():
        found = run(scaled.narrowed(stretched), clock.left_s, gap)
        if found.found and arrays.broken(found.values).any():
            raise SolverError(Problem("solver", "an answer outside its constraints, twice"))
        if found.status == "infeasible":  # of the narrowed program: of this one it is not known
            found = replace(found, status="unknown")
    objective = float(arrays.cost @ found.values) if found.found else np.inf
    if (
        found.status == "optimal"
        and gap == 0.0
        and (not stretched.any() or objective - bound <= _EXACT * abs(objective))
    ):
        bound = objective
    elif found.status == "optimal" and stretched.any():
        found = replace(found, status="feasible")
    return replace(found, objective=objective, bound=min(bound, objective), wall_s=clock.spent_s)


# -- details -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Arrays:
    """A program as arrays; ``rows``, ``columns`` and ``values`` are the entries of A."""

    cost: Floats
    upper: Floats
    integer: NDArray[np.bool_]
    rows: Index
    columns: Index
    values: Floats
    low: Floats
    high: Floats
    cost_scale: float = 1.0

    def sizes(self) -> Floats:
        """The largest coefficient of every row; 1 where it is empty."""
        largest = np.zeros(len(self.low))
        np.maximum.at(largest, self.rows, np.abs(self.values))
        return np.where(largest > 0.0, largest, 1.0)

    def scaled(self) -> _Arrays:
        """Costs up to a million, and coefficients up to 1 in every row."""
        largest = float(np.abs(self.cost).max())
        scale, sizes = (_SCALE / largest if largest else 1.0), self.sizes()
        return replace(
            self, cost=self.cost * scale, values=self.values / sizes[self.rows], low=self.low / sizes,
            high=self.high / sizes, cost_scale=scale,
        )  # fmt: skip

    def broken(self, values: Floats) -> NDArray[np.bool_]:
        """Rows of whole numbers alone that the values do not satisfy."""
        whole = np.ones(len(self.low), dtype=bool)
        whole[self.rows[~self.integer[self.columns]]] = False
        found = np.zeros(len(self.low))
        np.add.at(found, self.rows, self.values * values[self.columns])
        slack = _EXACT * np.maximum(self.sizes(), np.abs(found))
        return whole & ((found > self.high + slack) | (found < self.low - slack))

    def narrowed(self, rows: NDArray[np.bool_]) -> _Arrays:
        """The (scaled) program with some of its inequalities narrowed."""
        free = rows & (self.low < self.high)
        return replace(self, low=self.low + _NARROWING * free, high=self.high - _NARROWING * free)


def _scipy(program: _Arrays, time_limit_s: float | None, gap: float) -> MilpSolution:
    """HiGHS through scipy."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    shape = (len(program.low), len(program.cost))
    matrix = csr_array((program.values, (program.rows, program.columns)), shape=shape)
    options: dict[str, float] = {"mip_rel_gap": gap}
    if time_limit_s is not None:
        options["time_limit"] = max(time_limit_s, 1e-3)
    with _silence():
        found = milp(
            program.cost, integrality=program.integer.astype(int), bounds=Bounds(0.0, program.upper),
            constraints=[LinearConstraint(matrix, program.low, program.high)] if shape[0] else [], options=options,
        )  # fmt: skip
    bound = -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
    if found.status == 0 and not program.integer.any():
        bound = float(found.fun)
    solver = "HiGHS (scipy)"
    if found.status == 2:
        return MilpSolution("infeasible", np.zeros(0), np.inf, np.inf, solver, 0.0)
    if found.status not in (0, 1):
        raise SolverError(Problem("solver", f"{solver} gave up: {found.message}"))
    if found.x is None:
        return MilpSolution("unknown", np.zeros(0), np.inf, bound, solver, 0.0)
    values = np.where(program.integer, np.rint(found.x), found.x)
    return MilpSolution("feasible" if found.status else "optimal", values, np.inf, bound, solver, 0.0)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps what HiGHS writes to the process's output, whatever it is told, from what the program prints."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no output to keep it from
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _pulp(program: _Arrays, time_limit_s: float | None, gap: float) -> MilpSolution:
    """HiGHS through PuLP where highspy is installed, else CBC; what PuLP 3 says of version 4 is answered by the pin below it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return _by_pulp(program, time_limit_s, gap)


def _by_pulp(program: _Arrays, time_limit_s: float | None, gap: float) -> MilpSolution:
    import pulp  # type: ignore[import-untyped]

    problem = pulp.LpProblem("program", pulp.LpMinimize)
    variables = [
        pulp.LpVariable(
            f"x{i}", 0, None if np.isinf(upper) else float(upper), "Integer" if whole else "Continuous"
        )
        for i, (upper, whole) in enumerate(zip(program.upper, program.integer, strict=True))
    ]
    problem.setObjective(pulp.LpAffineExpression(zip(variables, program.cost.tolist(), strict=True)))
    terms: list[dict[Any, float]] = [{} for _ in program.low]
    for row, column, value in zip(program.rows, program.columns, program.values, strict=True):
        variable = variables[column]
        terms[row][variable] = terms[row].get(variable, 0.0) + float(value)
    for row, low, high in zip(terms, program.low, program.high, strict=True):
        line = pulp.LpAffineExpression(row)
        if low == high:
            problem += line == float(low)
            continue
        if np.isfinite(low):
            problem += line >= float(low)
        if np.isfinite(high):
            problem += line <= float(high)
    highs = pulp.HiGHS(msg=False, gapRel=gap, timeLimit=time_limit_s)
    chosen = highs if highs.available() else pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=time_limit_s)
    solver = "HiGHS (PuLP)" if chosen is highs else "CBC (PuLP)"
    try:
        with _silence():
            status = problem.solve(chosen)
    except pulp.PulpSolverError as error:
        raise SolverError(Problem("solver", f"{solver} failed: {error}")) from None
    if status == pulp.LpStatusInfeasible:
        return MilpSolution("infeasible", np.zeros(0), np.inf, np.inf, solver, 0.0)
    bound = float(problem.solverModel.getInfo().mip_dual_bound) if chosen is highs else -np.inf
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        if status == pulp.LpStatusNotSolved and time_limit_s is not None:
            return MilpSolution("unknown", np.zeros(0), np.inf, bound, solver, 0.0)
        raise SolverError(Problem("solver", f"{solver} gave up: {pulp.LpStatus[status]}"))
    found = np.array([variable.value() or 0.0 for variable in variables])
    values = np.where(program.integer, np.rint(found), found)
    optimal = problem.sol_status == pulp.LpSolutionOptimal
    if optimal and gap == 0.0:
        bound = float(program.cost @ values)
    return MilpSolution("optimal" if optimal else "feasible", values, np.inf, bound, solver, 0.0)


def _joined(parts: list[Any]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0)
