"""Fits the software stacks' time constants to published training runs, and says how far they carry to runs left out.

A constant is one number of one stack (on one generation of accelerators, where it says so); a run takes it from the narrowest
stack that has it. The step time is the planner's own estimate. It is fitted in logarithms by a robust Gauss-Newton: the share
of a constant in the step is how much of the step is made of what it slows. Every source weighs the same, however many rows it
has, and a weak prior pulls every constant towards "as the best library's kernels alone".

    python benchmarks/fit_stacks.py TRAINING.csv…              # three tables: fitted on all, one model, one source left out
    python benchmarks/fit_stacks.py TRAINING.csv… --write      # and writes the constants into the stacks' files
    python benchmarks/fit_stacks.py TRAINING.csv… --json FIT.json  # errors by row: `planner validate --refitted`

Rows whose source contradicts itself (the validation's list) are left out of the fit.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from planner.errors import PlannerError
from planner.ledger import Collective
from planner.solve.named import examine
from planner.specs.library import hardware_folder
from planner.specs.stack import load_stack
from planner.uncertainty.constants import slowed_by
from planner.validation.exclusions import read_exclusions
from planner.validation.measured import asks_for, tokens_per_s_per_device
from planner.validation.plans import Run, run_of
from planner.validation.table import Table, Unsupported, read_table
from planner.validation.training import predicted_run

Key = tuple[str, str, str]  # stack, generation ("": any), constant

CONSTANTS: tuple[Key, ...] = (
    ("default", "", "matmul_slowdown"),
    ("default", "ampere", "matmul_slowdown"),
    ("default", "", "attention_slowdown"),
    ("default", "", "collective_slowdown"),
    ("megatron-bridge", "", "narrow_matmul_slowdown"),
    ("megatron-eager", "ampere", "matmul_slowdown"),
    ("megatron-eager", "", "stream_slowdown"),
    ("megatron-eager", "", "collective_slowdown"),
    ("megatron-deepspeed", "volta", "matmul_slowdown"),
    ("megatron-deepspeed", "", "waited_dispatches"),
    ("pytorch-fsdp", "", "matmul_slowdown"),
    ("pytorch-fsdp", "", "stream_slowdown"),
    ("pytorch-fsdp", "", "overlap_slowdown"),
    ("composer", "", "attention_slowdown"),
    ("composer", "hopper", "attention_slowdown"),
    ("composer", "", "overlap_slowdown"),
)
# A stack may have better kernels than those that were measured: newer libraries' products.
LOWEST = {"matmul_slowdown": 0.7, "narrow_matmul_slowdown": 0.7}
PRIORS = {"waited_dispatches": 5.0}  # 0.1 ms per kernel or call: an assumption; factors are drawn to 1
HIGHEST = {"waited_dispatches": 10.0, "overlap_slowdown": 2.0}  # twice as long is one after the other
_SPREAD = 0.35  # of the prior, in logarithms
_PRIOR_WEIGHT = 0.5  # in the fit, which only holds to it where rows tell nothing
_SOFT = 0.08  # relative error from which a row weighs less
_ROUNDS = 8
_HIDDEN = ("collective_slowdown", "overlap_slowdown")
_NUDGE = -0.02  # of a logarithm; downwards, where an overlap that is lost altogether still has a slope


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run."""

    run: Run
    source: str
    model: str
    measured: float  # tokens/s per device

    def constants(self) -> dict[str, Key]:
        """Which fitted constant each constant of this run's stack is; one that a nearer file states itself is none."""
        generation = self.run.problem.cluster.device.generation
        stack = self.run.problem.stack.name
        found: dict[str, Key | None] = {}
        for name in (stack, *_chain(stack)):
            for where in (generation, ""):
                found |= {
                    key[2]: key for key in CONSTANTS if key[:2] == (name, where) and key[2] not in found
                }
                found |= {constant: None for constant in _stated(name, where) if constant not in found}
        return {constant: key for constant, key in found.items() if key is not None}

    def with_stack(self, values: dict[Key, float]) -> Run:
        """The run with constants set."""
        mine = self.constants()
        problem = self.run.problem
        stack = problem.stack.on_generation(problem.cluster.device.generation)
        set_ = {
            name: replace(getattr(stack, name), value=values[key])
            for name, key in mine.items()
            if key in values
        }
        return replace(self.run, problem=replace(problem, stack=replace(stack, on={}, **set_)))


@cache
def _file(stack: str) -> dict[str, Any]:
    return tomllib.loads((hardware_folder() / "stacks" / f"{stack}.toml").read_text())


@cache
def _chain(stack: str) -> tuple[str, ...]:
    """The stacks that a stack extends, nearest first."""
    under = _file(stack).get("extends")
    return () if under is None else (under, *_chain(under))


@cache
def _stated(stack: str, generation: str) -> tuple[str, ...]:
    """Constants that a stack's own file states, of a generation or of all."""
    table = _file(stack)
    return tuple(table.get("on", {}).get(generation, {}) if generation else table)


def main() -> None:
    """Fits, prints, and writes when asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="write the constants into the stacks' files")
    parser.add_argument("--json", type=Path, help="write the three results as JSON")
    options = parser.parse_args()
    rows = read_rows(options.files)
    values = {key: _value_of(key) for key in CONSTANTS}
    values, errors, shares = _fitted(rows, values)
    everything = np.ones(len(rows), dtype=bool)
    spread = dict(zip(CONSTANTS, map(float, _spreads(rows, shares, everything)), strict=True))
    print(
        f"{len(CONSTANTS)} constants, {len(rows)} rows: {len(rows) / len(CONSTANTS):.0f} rows per constant\n"
    )
    for key in CONSTANTS:
        used = sum(key in row.constants().values() for row in rows)
        print(f"  {' '.join(filter(None, key)):45} {values[key]:.3g}  ± {spread[key]:.1%}  ({used} rows)")
    left_out: dict[str, Callable[[Row], str]] = {
        "model left out": lambda row: row.model,
        "source left out": lambda row: row.source,
    }
    results = {"all": errors} | {
        name: _left_out(rows, values, errors, shares, group) for name, group in left_out.items()
    }
    _print(rows, results)
    if options.json:
        table = {
            name: dict(zip((r.run.row.row_id for r in rows), map(float, e), strict=True))
            for name, e in results.items()
        }
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.write:
        write(values, spread, rows)


def read_rows(files: Sequence[Path]) -> list[Row]:
    """Every row that is fit for time and can be priced."""
    excluded, rows = read_exclusions(), []
    for path in files:
        table: Table = read_table(path)
        for row in table.rows:
            try:
                if "tokens_per_s_per_device" not in asks_for(row):
                    continue
                if row.row_id in excluded and excluded[row.row_id].reason("tokens_per_s_per_device"):
                    continue
                run, _ = predicted_run(run_of(row))
                problem = run.problem
                measured = tokens_per_s_per_device(
                    row, problem.model, problem.workload, problem.cluster.devices, problem.cluster.device,
                    str(problem.fixed["precision"]).replace("mx", "").replace("nv", "").removesuffix("_rowwise"),
                )  # fmt: skip
            except (Unsupported, PlannerError):
                continue
            rows.append(Row(run, row.file, row.text("model"), measured))
    return rows


def evaluate(rows: Sequence[Row], values: dict[Key, float]) -> tuple[np.ndarray, np.ndarray]:
    """log(predicted/measured seconds) of every row, and how it moves with the logarithm of every constant."""
    errors, shares = np.zeros(len(rows)), np.zeros((len(rows), len(CONSTANTS)))
    for index, row in enumerate(rows):
        errors[index], kinds = _evaluate(row, values)
        for name, key in row.constants().items():
            column = CONSTANTS.index(key)
            if (
                name in _HIDDEN and kinds[name]
            ):  # what is partly hidden has no share of its own: move it, and see
                moved = {**values, key: values[key] * exp(_NUDGE)}
                shares[index, column] = (_evaluate(row, moved)[0] - errors[index]) / _NUDGE
            else:
                shares[index, column] = kinds[name]
    return errors, shares


def _evaluate(row: Row, values: dict[Key, float]) -> tuple[float, dict[str, float]]:
    """log(predicted/measured seconds), and the share of the step (all of it, hidden or not) that each constant slows."""
    problem = row.with_stack(values).problem
    assembly, stack = examine(problem), problem.stack
    kinds: dict[str, float] = defaultdict(float)
    host = [spend for spend in assembly.spends if spend.share.item is None]
    paced = {(s.share.block, s.share.phase) for s in host if s.share.exposed_s < s.share.price_s}
    busy = sum(spend.seconds for spend in assembly.spends)
    for spend in assembly.spends:
        # Where the host sets the pace, its time is all that counts.
        kind = "dispatch_s" if (spend.share.block, spend.share.phase) in paced else slowed_by(spend, stack)
        if kind is not None:
            kinds[kind] += (spend.alone_s if kind in _HIDDEN else spend.seconds) / busy
        if spend.share.item is None and kind is None:
            kinds["waited_dispatches"] += spend.seconds / busy
        if isinstance(spend.share.item, Collective):
            kinds["overlap_slowdown"] += spend.alone_s / busy
    return log(row.measured / assembly.plan.estimate.tokens_per_s_per_device), kinds


def _fitted(rows: Sequence[Row], values: dict[Key, float]) -> tuple[dict[Key, float], np.ndarray, np.ndarray]:
    """Constants that fit all rows, with errors and shares there: steps that do not help are halved."""
    errors, shares = evaluate(rows, values)
    for _ in range(_ROUNDS):
        target, length = step(rows, values, errors, shares), 1.0
        while length > 0.1:
            tried = {key: values[key] * (target[key] / values[key]) ** length for key in CONSTANTS}
            there, slopes = evaluate(rows, tried)
            if _cost(rows, tried, there) < _cost(rows, values, errors):
                values, errors, shares = tried, there, slopes
                break
            length /= 2
        else:
            break
    return values, errors, shares


def _cost(rows: Sequence[Row], values: dict[Key, float], errors: np.ndarray) -> float:
    """What the fit makes small."""
    x = np.array([log(values[key]) for key in CONSTANTS])
    return float(np.sum(_residuals(errors, x, _weights(rows, np.ones(len(rows), dtype=bool))) ** 2))


def _weights(rows: Sequence[Row], used: np.ndarray) -> np.ndarray:
    """Every source weighs as much as eight rows, one of fewer as many as it has; 0 where a row is not used."""
    sources = np.array([row.source for row in rows])
    count = {source: int(np.sum(used & (sources == source))) for source in set(sources)}
    return np.array([1.0 / np.sqrt(max(count[s], 8)) for s in sources]) * np.sqrt(8.0) * used


def _residuals(errors: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted robust errors, and how far each constant is from what it is drawn to.

    Cauchy's loss: a run that is far off, which no constant explains, decides none. Under Huber's, whose pull does not fall, two
    of tr3m's runs took the collectives of all DeepSpeed from 1.1 to 2.9 once vTrain's runs were left out.
    """
    left = errors / _SOFT
    robust = np.sign(left) * np.sqrt(np.log1p(left**2))
    # What a constant is drawn to: the one that it stands in for, or that of the best library's kernels alone.
    origin = np.log([PRIORS.get(key[2], 1.0) for key in CONSTANTS])
    drawn = x - np.array(
        [x[above] if (above := _above(key)) >= 0 else origin[i] for i, key in enumerate(CONSTANTS)]
    )
    return np.concatenate([weights * robust, _PRIOR_WEIGHT * drawn / _SPREAD])


def step(
    rows: Sequence[Row],
    values: dict[Key, float],
    errors: np.ndarray,
    shares: np.ndarray,
    used: np.ndarray | None = None,
) -> dict[Key, float]:
    """Constants that fit the used rows best, by the errors and shares at ``values``."""
    used = np.ones(len(rows), dtype=bool) if used is None else used
    start, weights = np.array([log(values[key]) for key in CONSTANTS]), _weights(rows, used)

    def residuals(x: np.ndarray) -> np.ndarray:
        return _residuals(errors + shares @ (x - start), x, weights)

    low = np.log([LOWEST.get(key[2], 1.0) for key in CONSTANTS])
    high = np.log([HIGHEST.get(key[2], 4.0) for key in CONSTANTS])
    found = least_squares(residuals, np.clip(start, low + 1e-6, high - 1e-6), bounds=(low, high))
    return {key: exp(x) for key, x in zip(CONSTANTS, found.x, strict=True)}


@cache
def _above(key: Key) -> int:
    """Index of the constant that would hold if this one were not there; -1: none is fitted."""
    stack, generation, name = key
    wider = [(stack, "", name)] if generation else []
    wider += [
        (other, where, name)
        for other in _chain(stack)
        for where in ((generation, "") if generation else ("",))
    ]
    return next((CONSTANTS.index(other) for other in wider if other in CONSTANTS), -1)


def _left_out(
    rows: Sequence[Row],
    values: dict[Key, float],
    errors: np.ndarray,
    shares: np.ndarray,
    group: Callable[[Row], str],
) -> np.ndarray:
    """Errors of every row with constants fitted on the rows of the other groups alone."""
    groups = np.array([group(row) for row in rows])
    result = np.zeros(len(rows))
    for name in sorted(set(groups)):
        out = groups == name
        fold = step(rows, values, errors, shares, ~out)
        left = [row for row, is_out in zip(rows, out, strict=True) if is_out]
        result[out] = [_evaluate(row, fold)[0] for row in left]
    return result


def _spreads(rows: Sequence[Row], shares: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Standard error of each constant's logarithm, by the fit's normal equations at errors too small to weigh less.

    What no used row tells of is as uncertain as its prior.
    """
    slopes = shares * _weights(rows, used)[:, None] / _SOFT
    drawn = np.eye(len(CONSTANTS))
    for index, key in enumerate(CONSTANTS):
        if (above := _above(key)) >= 0:
            drawn[index, above] -= 1.0
    drawn /= _SPREAD
    found: np.ndarray = np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes + drawn.T @ drawn)))
    return found


def _print(rows: Sequence[Row], results: dict[str, np.ndarray]) -> None:
    sources = np.array([row.source for row in rows])
    print(f"\n{'source':42} {'rows':>5}" + "".join(f"{name:>24}" for name in results))
    medians: dict[str, list[float]] = defaultdict(list)
    tails: dict[str, list[float]] = defaultdict(list)
    for source in sorted(set(sources)):
        line = f"{source:42} {np.sum(sources == source):5}"
        for name, errors in results.items():
            ape = np.abs(np.exp(-errors[sources == source]) - 1.0)  # of tokens per second
            medians[name].append(float(np.median(ape)))
            tails[name].append(float(np.percentile(ape, 90)))
            line += f"{medians[name][-1]:14.1%} /{tails[name][-1]:7.1%}"
        print(line)
    line = f"{'mean over sources':42} {len(rows):5}"
    print(line + "".join(f"{np.mean(medians[n]):14.1%} /{np.mean(tails[n]):7.1%}" for n in results))


def _value_of(key: Key) -> float:
    """What the shipped files say of a constant; 1 of one that they do not have yet."""
    stack, generation, name = key
    constant = getattr(load_stack(stack).on_generation(generation), name)
    return 1.0 if constant is None else float(constant)


def write(values: dict[Key, float], spread: dict[Key, float], rows: Sequence[Row]) -> None:
    """Sets the constants in the stacks' files; comments and everything else stay."""
    for stack, generation, constant in CONSTANTS:
        key = (stack, generation, constant)
        path = hardware_folder() / "stacks" / f"{stack}.toml"
        used = sorted({row.source.removesuffix(".csv") for row in rows if key in row.constants().values()})
        used = used or [
            f"what {other} is drawn to"
            for other, *_ in (k for k in CONSTANTS if _above(k) == CONSTANTS.index(key))
        ]
        entry = (
            f'{constant} = {{ value = {values[key]:.3g}, kind = "fitted", spread = {spread[key]:.2g}, '
            f'source = "published-training-runs" }}  # {", ".join(used)}'
        )
        text = path.read_text()
        head, table, tail = text.partition(f"[on.{generation}]\n") if generation else (text, "", "")
        if generation and not table:
            head, table = text.rstrip() + "\n\n", f"[on.{generation}]\n"
        part = tail if generation else head
        line = re.compile(rf"^{constant} = .*$", re.MULTILINE)
        top = part.split("\n[", 1)
        if line.search(top[0]):
            top[0] = line.sub(entry, top[0])
        elif generation:
            top[0] = entry + "\n" + top[0]
        else:
            top[0] = top[0].rstrip() + "\n" + entry + "\n"
        part = "\n[".join(top)
        path.write_text(head + table + part if generation else part)


if __name__ == "__main__":
    main()
