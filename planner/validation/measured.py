"""What a training row measured: its rate, its peak memory, and whether it ran out of memory.

Every rate becomes tokens per second and device. A printed rate comes first, then a printed step time, then the same as the
collector of the table derived them, then FLOP/s and utilisation, by the convention that the row names.
"""

from __future__ import annotations

import re

from planner.plans.assemble import model_flop
from planner.specs.device import Device
from planner.specs.model import Model
from planner.specs.parameters import active_parameter_count
from planner.specs.workload import TrainWorkload
from planner.units import GB, GIB
from planner.validation.table import Row, Unsupported

__all__ = [
    "METRICS", "asks_for", "flop_per_token", "out_of_memory", "peak_memory_bytes", "tokens_per_s_per_device",
]  # fmt: skip

METRICS = {"time": "tokens_per_s_per_device", "memory": "peak_memory", "oom": "oom", "rank": "ranking"}
"""Words of the column ``score_for``, and the metrics that they ask for."""

_UNITS = {"GiB": GIB, "GB": GB, "": GB}
_TERA = 1e12


def asks_for(row: Row) -> tuple[str, ...]:
    """Metrics that the row may be judged on: what ``score_for`` names or, where the file has no such column, what it measured.

    Raises:
        Unsupported: a word is not known.
    """
    if "score_for" not in row.cells:
        rate = any(row.text(c) for c in ("tokens_per_s_per_device", "step_time_s", "tflops_per_device"))
        found = {"time": rate, "memory": row.text("peak_memory_gb"), "oom": row.text("oom"), "rank": rate}
        return tuple(METRICS[word] for word, there in found.items() if there)
    words = [word for word in row.text("score_for").split("+") if word not in ("", "none")]
    unknown = [word for word in words if word not in METRICS]
    if unknown:
        raise Unsupported(f"score_for names {', '.join(unknown)}; known are {', '.join(METRICS)} and none")
    return tuple(name for word, name in METRICS.items() if word in words)


def tokens_per_s_per_device(
    row: Row, model: Model, workload: TrainWorkload, devices: int, device: Device, dtype: str
) -> float:
    """The measured rate, tokens/s per device.

    Args:
        row: the row.
        model, workload: what it trained, for rates that are printed as FLOP/s.
        devices: how many it ran on.
        device: their kind, for rates that are printed as a fraction of its peak.
        dtype: format of its matrix products.

    Raises:
        Unsupported: the row holds no rate, or one that is not positive.
    """
    tokens = workload.tokens_per_step / devices
    for suffix in ("", "_derived"):
        rate, seconds = row.number(f"tokens_per_s_per_device{suffix}"), row.number(f"step_time_s{suffix}")
        if rate:
            return rate
        if seconds:
            return tokens / seconds
    achieved, used = row.number("tflops_per_device"), row.number("mfu")
    if achieved:
        return achieved * _TERA / flop_per_token(row, model, workload.seq_len)
    if used and device.supports(dtype):
        peak = float(device.peak_flop_per_s[dtype])
        return used * peak / (_model_flop(model, workload.seq_len) / workload.seq_len)
    raise Unsupported("no rate and no step time is given")


def peak_memory_bytes(row: Row) -> float:
    """Measured peak memory of a device, bytes.

    Raises:
        Unsupported: there is none, or its unit is not known.
    """
    value, unit = row.number("peak_memory_gb"), row.text("peak_memory_unit")
    if unit not in _UNITS:
        raise Unsupported(f"peak_memory_unit is {unit!r}, neither GiB nor GB")
    if not value:
        raise Unsupported("no peak memory is given")
    return value * _UNITS[unit]


def out_of_memory(row: Row) -> bool:
    """Whether the run failed for lack of memory.

    Raises:
        Unsupported: the row does not say.
    """
    failed = row.truth("oom")
    if failed is None:
        raise Unsupported("the row does not say whether it ran out of memory")
    return failed


def flop_per_token(row: Row, model: Model, seq_len: int) -> float:
    """FLOP of one token as the row counts them: of the model or of the hardware, by parameters or by products.

    Model FLOP are forward and backward with full attention (Narayanan et al. 2021, arXiv:2104.04473); hardware FLOP count the
    forward of recomputed layers again. A convention that names parameters takes 2·P per token and pass, with 3 passes for model
    FLOP, and 4 for hardware FLOP with full recompute.

    A row that names none counts model FLOP.

    Raises:
        Unsupported: the convention that the row names is not known.
    """
    convention = row.text("tflops_convention").lower() or "model"
    if not convention.startswith(("model", "hardware")):
        raise Unsupported(f"FLOP/s by an unknown convention: {convention}")
    again = convention.startswith("hardware") and row.text("recompute") == "full"
    if re.search(r"x ?params|params ?\*|params_b", convention):
        return 2.0 * (4.0 if again else 3.0) * active_parameter_count(model)
    whole = _model_flop(model, seq_len) / seq_len
    head = 6.0 * model.hidden * model.vocab
    return (whole - head) * (4.0 / 3.0 if again else 1.0) + head


def _model_flop(model: Model, seq_len: int) -> float:
    return model_flop(model, TrainWorkload(1, seq_len))
