"""Collectives that others measured, held against the prices that the engine would give them.

Every table of collectives is one of a few forms, told apart by its columns; a form turns a row into a :class:`Call` on a cluster.
Calls with the same collective on the same devices are priced together, through the levels and costs of the engine.

Conventions: bytes are the full tensor of an all-reduce, the gathered tensor of an all-gather or reduce-scatter, what one rank
holds of an all-to-all, and the message of a send (nccl-tests, doc/PERFORMANCE.md). Bus bandwidth is bytes over seconds times
2(n−1)/n for all-reduce, (n−1)/n for all-gather, reduce-scatter and all-to-all, 1 for a send. A call is *large* above 64 KiB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.costs.arrays import Real
from planner.costs.collective_algorithms import Collective
from planner.costs.collectives import Level, collective_costs, custom_all_reduce_s, fastest_s
from planner.engine.kernels import Kernels
from planner.errors import PlannerError
from planner.specs.device import Device
from planner.validation.call_machine import Machine, levels_of
from planner.validation.expert_exchange import is_exchange, score_exchanges
from planner.validation.scores import ScoredRow
from planner.validation.table import Row, Unsupported, read_table

__all__ = ["SMALL_BYTES", "Call", "bus_bytes_per_s", "call_s", "calls", "score_collectives"]

SMALL_BYTES = 64 * 1024
_KINDS: dict[str, Collective] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "point_to_point",
    "send_recv": "point_to_point",
}
_BUS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}  # times (n - 1) / n
# Host time of a call that is not captured in a graph, in dispatches of one kernel: fitted to the eager rows of
# ai-dynamo/aiconfigurator@095f58a custom_allreduce, whose frameworks issue several kernels and checks per call.
_EAGER_DISPATCHES = 5.5


@dataclass(frozen=True, slots=True)
class Call:
    """One measured call.

    Attributes:
        row: where it stands.
        kind: the collective.
        machine: what it ran on.
        n_bytes: its size, by the convention of the module.
        measured_s: how long it took.
        library: ``nccl``, or ``custom``: a serving framework's all-reduce.
        eager: whether the host issued it kernel by kernel.
    """

    row: Row
    kind: Collective
    machine: Machine
    n_bytes: float
    measured_s: float
    library: str = "nccl"
    eager: bool = False

    @property
    def ranks(self) -> int:
        """Ranks that take part."""
        return self.machine.nodes * self.machine.devices_per_node

    @property
    def metric(self) -> str:
        """``collective_large`` above 64 KiB, else ``collective_small``."""
        return "collective_large" if self.n_bytes > SMALL_BYTES else "collective_small"


def score_collectives(path: str | Path) -> list[ScoredRow]:
    """Scores every row of a table of collectives, or of dispatch and combine kernels.

    Args:
        path: a CSV file.

    Returns:
        Scored rows, seconds. The metric is ``collective_large`` or ``collective_small``, or ``expert_all_to_all`` for kernels of
        their own between experts, of which a row may hold two.

    Raises:
        SpecError: the file cannot be read.
    """
    if is_exchange(read_table(path).columns):
        return score_exchanges(path)
    found, refused = calls(path)
    scored = list(refused)
    batches: dict[tuple[Collective, Machine, str, bool], list[Call]] = defaultdict(list)
    for call in found:
        batches[call.kind, call.machine, call.library, call.eager].append(call)
    for (kind, machine, library, eager), batch in batches.items():
        try:
            levels, device = levels_of(machine)
        except (PlannerError, Unsupported) as error:
            scored += [_refused(call.row, call.metric, str(error)) for call in batch]
            continue
        n_bytes = np.array([call.n_bytes for call in batch])
        predicted = np.asarray(call_s(kind, n_bytes, levels, device, library, eager))
        scored += [_scored(call, s) for call, s in zip(batch, predicted.tolist(), strict=True)]
    return scored


def call_s(
    kind: Collective,
    n_bytes: Real,
    levels: Sequence[Level],
    device: Device,
    library: str = "nccl",
    eager: bool = False,
) -> Real:
    """Predicted seconds of calls.

    Args:
        kind: the collective.
        n_bytes: sizes.
        levels: the group's way through the network.
        device: what the host and the copy of an eager call run on.
        library, eager: as in :class:`Call`.
    """
    custom = library == "custom"
    seconds = (
        custom_all_reduce_s(n_bytes, levels) if custom else fastest_s(n_bytes, collective_costs(kind, levels))
    )
    if not eager:
        return seconds
    copy_s = Kernels(device).stream_s(2.0 * n_bytes)
    return np.maximum(seconds + copy_s, _EAGER_DISPATCHES * float(device.dispatch_s))


def calls(path: str | Path) -> tuple[list[Call], list[ScoredRow]]:
    """The calls of a table, and the rows that are none: scored as unsupported, with the reason.

    Raises:
        SpecError: the file cannot be read.
    """
    table = read_table(path)
    form = next((form for columns, form in _FORMS if columns <= set(table.columns)), None)
    found, refused = [], []
    for row in table.rows:
        try:
            if form is None:
                raise Unsupported("no known form of a table of collectives")
            found.append(form(row))
        except Unsupported as error:
            refused.append(_refused(row, "collective_large", str(error)))
    return found, refused


def bus_bytes_per_s(kind: Collective, n_bytes: Real, seconds: Real, ranks: Real) -> Real:
    """Bus bandwidth, bytes/s: what a link carries, whatever the collective and the number of ranks.

    >>> bus_bytes_per_s("all_reduce", 8e9, 0.1, 8)
    140000000000.0
    """
    return n_bytes / seconds * (_BUS[kind] * (ranks - 1.0) / ranks if kind in _BUS else 1.0)


# -- forms of tables -----------------------------------------------------------------------------------------------


def _nccl_tests(row: Row) -> Call:
    """nccl-tests as aiconfigurator stores it: one or several nodes, milliseconds."""
    return Call(
        row, _kind(row), _aic_machine(row), _needed(row, "size_bytes"), 1e-3 * _needed(row, "latency_ms")
    )


def _custom_all_reduce(row: Row) -> Call:
    """All-reduce kernels of serving frameworks as aiconfigurator stores them."""
    eager = "eager" in row.text("implementation") or "eager" in row.text("kernel_source")
    n_bytes, seconds = _needed(row, "size_bytes"), 1e-3 * _needed(row, "latency_ms")
    return Call(row, "all_reduce", _aic_machine(row), n_bytes, seconds, "custom", eager)


def _aic_machine(row: Row) -> Machine:
    nodes = _count(row, "n_nodes")
    return Machine(row.text("accelerator"), nodes, max(_count(row, "n_devices") // nodes, 1))


def _vidur(row: Row) -> Call:
    """vidur: devices per node and the link inside the node are named, what joins the nodes is not."""
    ranks, per_node = _count(row, "num_workers"), _count(row, "devices_per_node")
    machine = Machine(
        row.text("accelerator"), max(ranks // per_node, 1), min(per_node, ranks), row.text("interconnect")
    )
    return Call(row, _kind(row), machine, _needed(row, "size_bytes"), 1e-3 * _needed(row, "latency_ms"))


def _apex(row: Row) -> Call:
    """APEX+: whole KiB, 0 below one; microseconds."""
    machine = Machine(row.text("accelerator"), _count(row, "num_nodes"), _count(row, "num_gpus_per_node"))
    n_bytes = max(_needed(row, "size_kb", zero=True) * 1024.0, 512.0)
    return Call(row, _kind(row), machine, n_bytes, 1e-6 * _needed(row, "latency_us"))


_FORMS: tuple[tuple[set[str], Callable[[Row], Call]], ...] = (
    ({"allreduce_dtype", "n_devices", "size_bytes", "latency_ms"}, _custom_all_reduce),
    ({"collective", "n_nodes", "n_devices", "size_bytes", "latency_ms"}, _nccl_tests),
    ({"collective", "num_workers", "devices_per_node", "size_bytes", "latency_ms"}, _vidur),
    ({"collective", "num_nodes", "num_gpus_per_node", "size_kb", "latency_us"}, _apex),
)


def _kind(row: Row) -> Collective:
    name = row.text("collective").lower().replace("-", "_")
    if name not in _KINDS:
        raise Unsupported(f"collective is {row.text('collective')!r}, none of {', '.join(_KINDS)}")
    return _KINDS[name]


def _needed(row: Row, column: str, zero: bool = False) -> float:
    value = row.number(column)
    if value is None or not (value > 0.0 or zero):
        raise Unsupported(f"{column} is {row.text(column)!r}, no positive number")
    return value


def _count(row: Row, column: str) -> int:
    value = row.whole(column)
    if not value:
        raise Unsupported(f"{column} is {row.text(column)!r}, no whole number from 1")
    return value


def _scored(call: Call, predicted_s: float) -> ScoredRow:
    return ScoredRow(
        call.row.row_id,
        call.row.file,
        call.metric,
        "scored",
        "",
        call.measured_s,
        predicted_s,
        _groups(call.row),
    )


def _refused(row: Row, metric: str, reason: str) -> ScoredRow:
    return ScoredRow(row.row_id, row.file, metric, "unsupported", reason, groups=_groups(row))


def _groups(row: Row) -> dict[str, str]:
    return {
        "source": row.file,
        **{name: row.text(name) for name in ("accelerator", "collective", "framework")},
    }
