"""Dispatch and combine kernels that others measured, held against what the planner would say about them.

Forms: DeepEP in its normal and its low-latency mode, microseconds, two kernels a row; TensorRT-LLM's all-to-all, milliseconds,
one kernel a row. Routing is taken as balanced: a token's experts lie anywhere with the same probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from planner.costs.collectives import Level
from planner.costs.expert_exchange import exchange_traffic
from planner.engine.kernel_prices import exchange_s
from planner.errors import PlannerError
from planner.specs.device_file import load_device
from planner.specs.exchange_library import ExchangeKernel, exchange_libraries
from planner.validation.call_machine import Machine, device_name, levels_of
from planner.validation.scores import ScoredRow
from planner.validation.table import Row, Unsupported, read_table

__all__ = ["METRIC", "Exchange", "exchanges", "is_exchange", "score_exchanges", "traffic_bytes"]

METRIC = "expert_all_to_all"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One measured kernel.

    Attributes:
        row: where it stands.
        library, kernel: names in ``hardware_profiles/exchange_libraries.toml``.
        machine: what it ran on.
        tokens: per rank.
        hidden: elements of a token.
        topk: experts of a token.
        experts: of the layer.
        units: multiprocessors that the kernel was given; 0 where the row does not say.
        measured_s: how long it took.
    """

    row: Row
    library: str
    kernel: str
    machine: Machine
    tokens: float
    hidden: float
    topk: float
    experts: float
    units: float
    measured_s: float


def is_exchange(columns: tuple[str, ...]) -> bool:
    """Whether a table with these columns holds dispatch and combine kernels."""
    return any(needed <= set(columns) for needed, _ in _FORMS)


def score_exchanges(path: str | Path) -> list[ScoredRow]:
    """Scores every kernel of a table, seconds.

    Raises:
        SpecError: the file cannot be read.
    """
    scored = []
    for found in exchanges(path):
        if isinstance(found, ScoredRow):
            scored.append(found)
            continue
        row, kernel = found.row, exchange_libraries()[found.library][found.kernel]
        groups = {"source": row.file, "accelerator": row.text("accelerator"), "kernel": found.kernel}
        try:
            levels, _ = levels_of(found.machine)
        except (PlannerError, Unsupported) as error:
            scored.append(_refused(row, str(error)))
            continue
        predicted = float(exchange_s(kernel, *traffic_bytes(found, kernel, levels), levels, found.units))
        scored.append(
            ScoredRow(row.row_id, row.file, METRIC, "scored", "", found.measured_s, predicted, groups)
        )
    return scored


def traffic_bytes(found: Exchange, kernel: ExchangeKernel, levels: list[Level]) -> tuple[float, float]:
    """Bytes that a rank sends over the innermost tier, its own copies included, and to other domains of that tier."""
    each = found.tokens * float(kernel.bytes_per_element)
    if kernel.copies == "none":  # a number per token and expert
        return each * found.experts, 0.0
    per_rank = kernel.copies == "rank"
    link_bytes, remote_bytes = exchange_traffic(each * found.hidden, found.topk, levels, per_rank=per_rank)
    return float(link_bytes), float(remote_bytes)


def exchanges(path: str | Path) -> Iterator[Exchange | ScoredRow]:
    """The kernels of a table; a row that cannot be read is an unsupported scored row.

    Raises:
        SpecError: the file cannot be read.
    """
    table = read_table(path)
    form = next(form for needed, form in _FORMS if needed <= set(table.columns))
    for row in table.rows:
        try:
            yield from list(form(row))
        except Unsupported as error:
            yield _refused(row, str(error))


# -- forms of tables -----------------------------------------------------------------------------------------------


def _low_latency(row: Row) -> Iterator[Exchange]:
    for kernel in ("dispatch", "combine"):
        yield _deepep(row, "deepep-low-latency", kernel, 0.0, _needed(row, f"{kernel}_avg_t_us"))


def _normal(row: Row) -> Iterator[Exchange]:
    for kernel in ("dispatch", "combine"):
        measured_us = _needed(row, f"{kernel}_transmit_us") + (row.number(f"{kernel}_notify_us") or 0.0)
        yield _deepep(row, "deepep-normal", kernel, _needed(row, f"{kernel}_sms"), measured_us)


def _deepep(row: Row, library: str, kernel: str, units: float, measured_us: float) -> Exchange:
    return Exchange(
        row, library, kernel,
        _machine(row.text("accelerator"), nodes=int(_needed(row, "node_num"))),
        _needed(row, "num_token"), _needed(row, "hidden_size"), _needed(row, "num_topk"), _needed(row, "num_experts"),
        units, 1e-6 * measured_us,
    )  # fmt: skip


def _tensorrt(row: Row) -> Iterator[Exchange]:
    """The width of a combine is that of the activations, whatever was dispatched, but where its name says otherwise."""
    sides = {"NVLinkTwoSided": "trtllm-two-sided", "NVLinkOneSided": "trtllm-one-sided"}
    library, dtype = sides.get(row.text("kernel_source"), ""), row.text("moe_dtype")
    kernel = {
        "alltoall_prepare": "prepare",
        "alltoall_dispatch": f"dispatch-{dtype}",
        "alltoall_combine": "combine",
        "alltoall_combine_low_precision": f"combine-{dtype}",
    }.get(row.text("op_name"), "")
    if kernel not in exchange_libraries().get(library, {}):
        raise Unsupported(f"no constants of {row.text('kernel_source')} {row.text('op_name')} {dtype}")
    ranks = int(_needed(row, "moe_ep_size"))
    yield Exchange(
        row, library, kernel, _machine(row.text("accelerator"), ranks=ranks),
        _needed(row, "num_tokens"), _needed(row, "hidden_size"), _needed(row, "topk"), _needed(row, "num_experts"),
        0.0, 1e-3 * _needed(row, "latency_ms"),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _machine(name: str, nodes: int | None = None, ranks: int = 0) -> Machine:
    """So many nodes as the part is sold in, or as many as the ranks need."""
    per_node = load_device(device_name(Machine(name, 1, 1))).devices_per_node
    if nodes is not None:
        return Machine(name, nodes, per_node, rdma=True)
    return Machine(name, max(ranks // per_node, 1), min(ranks, per_node), rdma=True)


_FORMS = (
    ({"dispatch_avg_t_us", "combine_avg_t_us", "node_num", "num_token"}, _low_latency),
    ({"dispatch_transmit_us", "combine_transmit_us", "dispatch_sms", "node_num"}, _normal),
    ({"op_name", "kernel_source", "moe_ep_size", "latency_ms"}, _tensorrt),
)


def _needed(row: Row, column: str) -> float:
    value = row.number(column)
    if not value:
        raise Unsupported(f"{column} is {row.text(column)!r}, no positive number")
    return value


def _refused(row: Row, reason: str) -> ScoredRow:
    return ScoredRow(row.row_id, row.file, METRIC, "unsupported", reason, groups={"source": row.file})
