"""Collectives timed with ``torch.distributed``: over NCCL with a GPU per process, else over gloo."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planner.calibration.measure import DTYPES, Setting, processor_name, torch_module
from planner.calibration.stopwatch import Timing, keep_freed_memory, repeated
from planner.costs.precision import dtype_bytes
from planner.errors import Problem, SpecError

__all__ = ["measure_collectives"]

_SIZES_BYTES = tuple(
    4 * round(2 ** (third / 3) / 4) for third in range(30, 85)
)  # 1 KiB to 256 MiB, three an octave
_SHORTEST_S = 0.02  # of one repeat
_REPEATS = 9
_LONGEST_S = 1.0


def measure_collectives(setting: Setting) -> list[dict[str, Any]]:
    """Rows of all collectives that the library has, sizes of the full tensor (all-to-all: of what one rank holds).

    Raises:
        SpecError: the processes could not be started, or one of them failed.
    """
    torch = torch_module()
    if setting.on == "cuda" and torch.cuda.device_count() < setting.processes:
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise SpecError(Problem("--processes", found, f"one for each of {setting.processes} processes"))
    sizes = _SIZES_BYTES[::6] if setting.quick else _SIZES_BYTES
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        try:
            torch.multiprocessing.spawn(
                _worker,
                args=(setting, sizes, f"file://{folder}/store", str(results)),
                nprocs=setting.processes,
            )
        except Exception as error:  # what a failed process leaves is the library's own exception
            last = str(error).strip().splitlines()[-1]
            raise SpecError(
                Problem("planner calibrate measure", f"a process failed: {last}", "collectives that run")
            ) from None
        rows = json.loads(results.read_text(encoding="utf-8"))
    backend = "nccl" if setting.on == "cuda" else "gloo"
    origin = {
        "source": f"planner calibrate measure {datetime.now(UTC).date().isoformat()}",
        "accelerator": processor_name(setting),
        "library": backend,
        "version": f"torch {torch.__version__}",
    }
    return [origin | row for row in rows]


def _worker(rank: int, setting: Setting, sizes: Sequence[int], store: str, results: str) -> None:
    """One process: times every collective at every size, in step with the others."""
    torch = torch_module()
    dist = torch.distributed
    if setting.on == "cpu":
        torch.set_num_threads(setting.threads)
        keep_freed_memory()
    else:
        torch.cuda.set_device(rank)
    backend = "nccl" if setting.on == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=setting.processes)
    rows: list[dict[str, Any]] = []
    for name in _CALLS:
        for size in sizes:
            timing = _timed(name, size, setting)
            if timing is None:
                break
            rows.append(_row(name, size, setting, timing))
            if timing.seconds > _LONGEST_S / 5.0:
                break  # larger ones take no other way
    if rank == 0:
        Path(results).write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _row(name: str, size: int, setting: Setting, timing: Timing) -> dict[str, Any]:
    spread = asdict(timing)
    return {
        "collective": name, "dtype": DTYPES[setting.dtype], "n_nodes": 1, "n_devices": setting.processes,
        "n_elements": int(size / dtype_bytes(setting.dtype)), "size_bytes": size,
        "latency_ms": f"{timing.seconds * 1e3:.6g}", "latency_min_ms": f"{spread['least_s'] * 1e3:.6g}",
        "latency_max_ms": f"{spread['most_s'] * 1e3:.6g}", "repeats": timing.repeats,
    }  # fmt: skip


def _timed(name: str, size: int, setting: Setting) -> Timing | None:
    """Times one collective at one size, all ranks agreeing on how often; None where the library lacks it."""
    torch = torch_module()
    dist = torch.distributed
    dtype = getattr(torch, DTYPES[setting.dtype])
    count = max(int(size / dtype_bytes(setting.dtype)) // setting.processes, 1) * setting.processes
    full = torch.zeros(count, dtype=dtype, device=setting.on)
    part = torch.zeros(count // setting.processes, dtype=dtype, device=setting.on)
    call = _CALLS[name](dist, full, part)
    try:
        call()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    once_s = _together(call, 1, setting)
    inner = max(int(_SHORTEST_S / max(once_s, 1e-9)), 1)
    # Ranks wait for each other, so that a disturbed repeat does not show in what one of them used: the median must do.
    return repeated(lambda: (_together(call, inner, setting), True), enough=_REPEATS)


def _together(call: Callable[[], object], inner: int, setting: Setting) -> float:
    """Seconds per call of the slowest rank."""
    torch = torch_module()
    dist = torch.distributed
    dist.barrier()
    wall = time.perf_counter()
    for _ in range(inner):
        call()
    if setting.on == "cuda":
        torch.cuda.synchronize()
    slowest = torch.tensor([time.perf_counter() - wall], dtype=torch.float64, device=setting.on)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest) / inner


def _pair(dist: Any, full: Any, part: Any) -> Callable[[], object]:
    """Every rank sends to the next and receives from the one before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    other = full.clone()

    def call() -> None:
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, full, (rank + 1) % size), dist.P2POp(dist.irecv, other, (rank - 1) % size)
        ])  # fmt: skip
        for work in works:
            work.wait()

    return call


def _exchange(dist: Any, full: Any, part: Any) -> Callable[[], object]:
    other = full.clone()
    return lambda: dist.all_to_all_single(other, full)


_CALLS: dict[str, Callable[[Any, Any, Any], Callable[[], object]]] = {
    "all_reduce": lambda dist, full, part: lambda: dist.all_reduce(full),
    "all_gather": lambda dist, full, part: lambda: dist.all_gather_into_tensor(full, part),
    "reduce_scatter": lambda dist, full, part: lambda: dist.reduce_scatter_tensor(part, full),
    "alltoall": _exchange,
    "broadcast": lambda dist, full, part: lambda: dist.broadcast(full, src=0),
    "sendrecv": _pair,
}
