"""Published runs and how far off their predictions are: the table that residuals are fitted to, and that a job is compared with.

``published_runs.csv`` is written by ``planner validate --residuals``, never by hand: one line per run whose time or memory was
scored, with its configuration, what was measured, and the errors.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from planner.specs.model import Model
from planner.specs.parameters import active_parameter_count

__all__ = [
    "FILE",
    "PublishedRun",
    "active_parameters",
    "load_published_runs",
    "read_published_runs",
    "rounded",
    "shares_as_text",
    "shares_of",
    "write_published_runs",
]

FILE = Path(__file__).with_name("published_runs.csv")
_DIGITS = 4
_LEAST = 5e-4  # share of a step that is written down


class PublishedRun(NamedTuple):
    """One run.

    Attributes:
        row_id, source: name of the row, and file that it is from.
        model: its name as printed.
        stack: software stack that describes its framework.
        accelerator, generation: device profile, and its family.
        devices, seq_len, global_batch_size: of the job; ``tokens_per_step`` follows.
        active_parameters: parameters that a token meets.
        experts, state_space: whether it is a mixture of experts, and whether any of its layers is a state-space model.
        precision: format of matrix products.
        tp, cp, pp, ep: degrees of parallelism.
        tokens_per_s_per_device: measured; None where the run is not scored for time.
        error: of the predicted rate, ``predicted / measured - 1``, with constants fitted to all runs.
        error_without_model, error_without_source: the same with constants fitted without this model's, or this source's, runs.
        parts: shares of the predicted step by term, ``name:share`` with spaces between (:func:`shares_of`).
        constants_share: how much a step moves with one error in all constants at once: √Σ share² of the shares that they slow.
        peak_bytes: measured peak memory; None where the run is not scored for memory.
        peak_counts: ``allocated``, ``reserved``, ``smi`` or empty: which meter read it.
        peak_error: of the predicted peak.
        peak_uncertain: share of the predicted peak that software holds beside states and activations.
        ran_out: whether it ran out of memory; None where it is not scored for that.
        filled: predicted peak of the fullest device relative to its memory, of those.
        filled_uncertain: share of that peak that software holds.
    """

    row_id: str
    source: str
    model: str
    stack: str
    accelerator: str
    generation: str
    devices: int
    active_parameters: float
    experts: bool
    state_space: bool
    seq_len: int
    global_batch_size: int
    precision: str
    tp: int
    cp: int
    pp: int
    ep: int
    tokens_per_s_per_device: float | None = None
    error: float | None = None
    error_without_model: float | None = None
    error_without_source: float | None = None
    parts: str = ""
    constants_share: float | None = None
    peak_bytes: float | None = None
    peak_counts: str = ""
    peak_error: float | None = None
    peak_uncertain: float | None = None
    ran_out: bool | None = None
    filled: float | None = None
    filled_uncertain: float | None = None

    @property
    def held_out(self) -> bool:
        """Whether no constant was fitted to it, and no mechanism found on it."""
        return self.row_id.startswith("held_out")


@cache
def load_published_runs(generation: str = "") -> tuple[PublishedRun, ...]:
    """The shipped runs on one generation of accelerators, or all; none where there is no table (it is being made)."""
    return read_published_runs(FILE, generation) if FILE.is_file() else ()


def read_published_runs(path: Path, generation: str = "") -> tuple[PublishedRun, ...]:
    """The runs of a table that :func:`write_published_runs` wrote, those on one generation of accelerators or all."""
    with path.open(encoding="utf-8", newline="") as stream:
        assert next(stream).rstrip() == ",".join(_KINDS)
        lines = [line for line in stream if f",{generation}," in line] if generation else stream
        runs = (
            PublishedRun._make(read(cell) for read, cell in zip(_READERS, cells, strict=True))
            for cells in csv.reader(lines)
        )
        return tuple(run for run in runs if generation in ("", run.generation))


def write_published_runs(path: Path, runs: Iterable[PublishedRun]) -> None:
    """Writes runs as CSV, numbers with four significant digits."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_KINDS)
        writer.writerows([_text(getattr(run, name)) for name in _KINDS] for run in runs)


def rounded(runs: Iterable[PublishedRun]) -> list[PublishedRun]:
    """Runs as the table has them: what is fitted to them is fitted to the table, and can be fitted to it again."""
    return [PublishedRun._make(_READERS[at](_text(value)) for at, value in enumerate(run)) for run in runs]


def shares_as_text(shares: Mapping[str, float]) -> str:
    """Shares by term as a cell of the table, those that are worth it.

    >>> shares_of(shares_as_text({"matmul": 0.61234567, "overlap": 0.02, "offload": 1e-6}))
    {'matmul': 0.612, 'overlap': 0.02}
    """
    return " ".join(f"{name}:{share:.3g}" for name, share in shares.items() if share >= _LEAST)


def shares_of(text: str) -> dict[str, float]:
    """The shares that :func:`shares_as_text` wrote."""
    return {name: float(share) for name, share in (part.split(":") for part in text.split())}


def active_parameters(model: Model) -> float:
    """Parameters that a token meets: what runs of dense models and of mixtures are compared by."""
    return float(active_parameter_count(model))


_KINDS = {name: kind.__forward_arg__ for name, kind in PublishedRun.__annotations__.items()}
_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: text == "true",
    "bool | None": lambda text: text == "true" if text else None,
    "float | None": lambda text: float(text) if text else None,
}
_READERS = [_READ[kind] for kind in _KINDS.values()]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
