"""Fits the constants of ``hardware_profiles/exchange_libraries.toml`` to published dispatch and combine kernels.

    python benchmarks/fit_expert_exchange.py FOLDER [--write]

FOLDER holds tables as ``planner validate --operators`` reads them. Every kernel of a library is fitted by least squares (soft L1)
of the logarithm of time. Errors are printed in sample, and with all rows of one GPU left out, per kernel and GPU. ``--write``
puts the constants that were fitted on everything into the file.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from planner.costs.collectives import Level
from planner.costs.expert_exchange import expert_exchange_s
from planner.specs.exchange_library import exchange_libraries
from planner.specs.library import hardware_folder
from planner.validation.call_machine import levels_of
from planner.validation.expert_exchange import Exchange, exchanges, is_exchange, traffic_bytes
from planner.validation.scores import ScoredRow
from planner.validation.table import read_table

Batch = tuple[list[Level], np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_CONSTANTS = ("launches", "link_fraction", "unit_bytes_per_s", "remote_unit_bytes_per_s", "remote_s")
_BOUNDS = {"launches": (0.2, 30.0), "link_fraction": (0.05, 2.0), "remote_s": (1e-7, 1e-3)}
_RATE = (1e8, 1e12)
_WIDTH = 0.1  # residuals beyond 10 % count linearly


def main(arguments: Sequence[str]) -> None:
    """Fits every kernel, prints its errors, and with ``--write`` rewrites the file."""
    folder = next(Path(word) for word in arguments if not word.startswith("--"))
    rows = [found for path in sorted(folder.glob("*.csv")) for found in measured(path)]
    by_kernel: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for row in rows:
        by_kernel[row.library, row.kernel].append(row)
    constants = 0
    print(f"{'kernel':38} {'GPU':20} {'n':>5} {'median':>7} {'p90':>6} {'left out':>9} {'p90':>6}")
    for (library, kernel), found in sorted(by_kernel.items()):
        fitted = fit(library, kernel, found)
        table = exchange_libraries()[library][kernel]
        constants += sum(
            getattr(table, name) is not None and getattr(table, name).kind == "fitted" for name in _CONSTANTS
        )
        gpus = sorted({row.machine.device for row in found})
        for gpu in gpus:
            own = [row for row in found if row.machine.device == gpu]
            rest = [row for row in found if row.machine.device != gpu]
            cells = [*spread(errors(library, kernel, own, fitted))]
            cells += (
                [*spread(errors(library, kernel, own, fit(library, kernel, rest)))]
                if rest
                else [np.nan, np.nan]
            )
            median, p90, out, out_p90 = cells
            print(
                f"{library + ' ' + kernel:38} {gpu:20} {len(own):5} {median:7.1f} {p90:6.1f} {out:9.1f} {out_p90:6.1f}"
            )
        print("   ", {name: float(f"{value:.3g}") for name, value in fitted.items()})
        if "--write" in arguments:
            rewrite(library, kernel, fitted)
    print(f"{constants} constants for {len(rows)} kernels: one for {len(rows) / constants:.0f}")


def measured(path: Path) -> list[Exchange]:
    """The kernels of a table; none where it holds something else."""
    if not is_exchange(read_table(path).columns):
        return []
    return [found for found in exchanges(path) if not isinstance(found, ScoredRow)]


def batches(library: str, kernel: str, rows: Sequence[Exchange]) -> list[Batch]:
    """Levels, bytes over the link, bytes to other domains, multiprocessors and measured seconds of rows on one machine."""
    known = exchange_libraries()[library][kernel]
    grouped: dict[object, list[Exchange]] = defaultdict(list)
    for row in rows:
        grouped[row.machine].append(row)
    found = []
    for same in grouped.values():
        levels, _ = levels_of(same[0].machine)
        link_bytes, remote_bytes = np.array([traffic_bytes(row, known, levels) for row in same]).T
        units = np.array([row.units or np.inf for row in same])
        found.append((levels, link_bytes, remote_bytes, units, np.array([row.measured_s for row in same])))
    return found


def logs_of_ratios(prepared: Sequence[Batch], values: Mapping[str, float]) -> np.ndarray:
    """Logarithm of predicted over measured time, row by row."""
    found = []
    for levels, link_bytes, remote_bytes, units, seconds in prepared:
        inside = values.get("unit_bytes_per_s", np.inf)
        rate = np.where(remote_bytes > 0, values.get("remote_unit_bytes_per_s", inside), inside)
        bounded = np.isfinite(rate) & np.isfinite(units)
        predicted = expert_exchange_s(
            link_bytes,
            remote_bytes,
            levels,
            launches=values["launches"],
            link_fraction=values["link_fraction"],
            units=np.where(bounded, units, np.inf),
            unit_bytes_per_s=np.where(bounded, rate, 1.0),
            remote_s=values.get("remote_s", 0.0),
        )
        found.append(np.log(predicted / seconds))
    return np.concatenate(found)


def fit(library: str, kernel: str, rows: Sequence[Exchange]) -> dict[str, float]:
    """Constants of a kernel: fitted where its table calls them so."""
    known = {name: getattr(exchange_libraries()[library][kernel], name) for name in _CONSTANTS}
    given = {name: float(value) for name, value in known.items() if value is not None}
    names = [name for name in given if known[name].kind == "fitted"]
    prepared = batches(library, kernel, rows)
    low, high = np.log([_BOUNDS.get(name, _RATE) for name in names]).T
    first = np.clip(np.log([given[name] for name in names]), low + 1e-6, high - 1e-6)

    def residuals(logs: np.ndarray) -> np.ndarray:
        return logs_of_ratios(prepared, given | dict(zip(names, np.exp(logs).tolist(), strict=True)))

    solved = least_squares(
        residuals, first, bounds=(low, high), loss="soft_l1", f_scale=_WIDTH, diff_step=1e-4
    )
    return given | dict(zip(names, np.exp(solved.x).tolist(), strict=True))


def errors(library: str, kernel: str, rows: Sequence[Exchange], values: Mapping[str, float]) -> np.ndarray:
    """Absolute errors, fractions of the measured time."""
    return np.abs(np.expm1(logs_of_ratios(batches(library, kernel, rows), values)))


def spread(found: np.ndarray) -> tuple[float, float]:
    """Median and 90th percentile, percent."""
    return 100.0 * float(np.median(found)), 100.0 * float(np.percentile(found, 90))


def rewrite(library: str, kernel: str, values: Mapping[str, float]) -> None:
    """Puts fitted values into the kernel's table; nothing else in the file changes."""
    path = hardware_folder() / "exchange_libraries.toml"
    head, title, rest = path.read_text().partition(f"[{library}.{kernel}]\n")
    table, between, others = rest.partition("\n[")
    for name, value in values.items():
        table = re.sub(rf"^({name} = {{ value = )[^,]+", rf"\g<1>{value:.3g}", table, flags=re.MULTILINE)
    path.write_text(head + title + table + between + others)


if __name__ == "__main__":
    main(sys.argv[1:])
