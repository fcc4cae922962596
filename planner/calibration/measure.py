"""Microbenchmarks with PyTorch, as rows of the operators' CSV forms: which families there are, and under what setting."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError, did_you_mean

__all__ = ["DTYPES", "FAMILIES", "Setting", "measure_families", "processor_name", "table_text"]

FAMILIES = ("gemm", "attention", "stream", "collectives")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Setting:
    """Under what conditions to measure.

    Attributes:
        on: ``cpu`` or ``cuda``.
        dtype: of all tensors: one of :data:`DTYPES`.
        processes: of a collective, each on a device of its own (on a CPU: with ``threads`` threads each).
        threads: of one process on a CPU.
        quick: a coarse grid.
    """

    on: str = "cpu"
    dtype: str = "fp32"
    processes: int = 2
    threads: int = 1
    quick: bool = False

    def check(self) -> None:
        """Raises a SpecError unless PyTorch and the device are there, and every value is known."""
        problems = [
            Problem(where, repr(value), f"one of {', '.join(known)}", did_you_mean(value, known))
            for where, value, known in (("--on", self.on, _DEVICES), ("--dtype", self.dtype, tuple(DTYPES)))
            if value not in known
        ]
        problems += [
            Problem(where, str(value), f"{least} to 1024")
            for where, value, least in (("--processes", self.processes, 2), ("--threads", self.threads, 1))
            if not least <= value <= 1024
        ]
        if problems:
            raise SpecError(problems)
        torch = torch_module()
        if self.on == "cuda" and not torch.cuda.is_available():
            raise SpecError(Problem("--on", "PyTorch sees no CUDA device", "a CUDA device, or --on cpu"))


def torch_module() -> Any:
    """PyTorch.

    Raises:
        SpecError: it is not installed.
    """
    try:
        return import_module("torch")
    except ImportError:
        hint = "Install it with pip install torch."
        raise SpecError(
            Problem("planner calibrate measure", "PyTorch is not installed", "torch", hint)
        ) from None


def measure_families(families: Sequence[str], setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Rows by family.

    Raises:
        SpecError: PyTorch or the device is missing, or nothing could be measured.
    """
    setting.check()
    from planner.calibration.collective_runs import measure_collectives
    from planner.calibration.kernel_runs import KERNELS, measure_kernels

    tables: dict[str, list[dict[str, Any]]] = {}
    for family in families:
        if family in KERNELS:
            tables[family] = measure_kernels(family, setting)
        else:
            tables[family] = measure_collectives(setting)
    return tables


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def processor_name(setting: Setting) -> str:
    """The device's own name."""
    if setting.on == "cuda":
        return str(torch_module().cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for key, colon, value in (line.partition(":") for line in lines):
        if colon:
            facts.setdefault(key.strip(), value.strip())
    name, family, model = (facts.get(key, "unknown") for key in ("model name", "cpu family", "model"))
    return f"{name} family {family} model {model}"
