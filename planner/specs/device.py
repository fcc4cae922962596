"""One accelerator as its data sheet and its measurements describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["KINDS", "Device", "Efficiency", "ScaleUp", "Sourced", "Transport"]

KINDS = ("datasheet", "measured", "fitted", "assumed")


@dataclass(frozen=True, slots=True)
class Sourced:
    """A number with its kind (datasheet, measured, fitted, assumed) and the key of its source in ``SOURCES.toml``.

    ``spread`` is the standard error of its logarithm, where a fit gives one.
    """

    value: float
    kind: str
    source: str
    spread: float | None = None

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What kernels reach of the data sheet: the constants of the curves in ``planner.costs.compute`` and ``attention_kernel``.

    Fractions of peak are of the dense rate and hold at the clocks that the part sustains under its power limit; a generation that
    was never measured in a narrow format repeats its 16-bit fraction.
    """

    matmul: Sourced  # fraction of peak of a large 16-bit (or wider) matrix product
    matmul_8bit: Sourced  # the same, fp8 and int8
    matmul_4bit: Sourced  # the same, fp4
    matmul_burst: (
        Sourced  # rate of short products and attention on a chip not throttled yet, relative to the sustained
    )
    matmul_tile: Sourced  # edge of the output tile of one block, elements
    grouped_matmul: Sourced  # fraction of the product's rate that a grouped (per expert) one keeps
    overlap_loss: Sourced  # fraction of the shorter of arithmetic and traffic that the longer does not hide
    split_s: Sourced  # seconds per √length of a contraction (or walk over keys) that is split
    memory: Sourced  # fraction of memory bandwidth of a long stream
    l2_speedup: Sourced  # rate of the second-level cache relative to that of the memory
    attention: Sourced  # fraction of peak of the products of a long fused attention forward, 16-bit
    attention_8bit: Sourced  # the same, fp8
    attention_backward: Sourced  # the same, of its backward, 16-bit
    softmax_flop: Sourced  # fp32 vector FLOP per score that its products do not hide
    attention_tile: Sourced  # rows of queries of one unit of work
    attention_straggler: Sourced  # time of the longest unit alone, relative to its share of the rate
    attention_tile_s: Sourced  # seconds that start and end of one unit take


@dataclass(frozen=True, slots=True)
class Transport:
    """The constants of :class:`planner.costs.collectives.Transport`, which says what each means, with their sources.

    Fractions are of the link's rate times its ``efficiency``. None: the link has nothing of the kind.
    """

    launch_s: Sourced
    small_fraction: Sourced
    bulk_hop_s: Sourced
    own_share: Sourced
    exchange_s: Sourced
    peer_s: Sourced
    peer_bytes_per_s: Sourced
    bulk_exchange_s: Sourced
    exchange_fraction: Sourced
    exchange_own_share: Sourced
    multicast_s: Sourced | None = None
    multicast_fraction: Sourced | None = None
    direct_hop_s: Sourced | None = None
    direct_fraction: Sourced | None = None


@dataclass(frozen=True, slots=True)
class ScaleUp:
    """The domain of fast links that the part is sold in (NVLink, xGMI, ICI, PCIe): per device, per direction."""

    kind: str
    domain: int  # devices in one domain
    bytes_per_s: Sourced
    latency_s: Sourced
    topology: str  # switch | mesh | torus | host
    efficiency: Sourced  # fraction of the link rate that a large collective reaches
    transport: Transport | None = None  # None: collectives on it are priced by rate and latency alone


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator: SI base units, dense peaks, link rates per direction and per device.

    ``peak_flop_per_s`` maps a dtype (fp32, tf32, fp16, bf16, fp8, fp4, int8) to the dense rate; a missing dtype is
    not supported. ``memory_bytes`` is what the driver reports as total.
    """

    name: str
    vendor: str
    year: int
    peak_flop_per_s: Mapping[str, Sourced]
    vector_flop_per_s: Sourced  # fp32 outside the matrix units
    memory_bytes: Sourced
    memory_bytes_per_s: Sourced
    l2_bytes: Sourced
    multiprocessors: Sourced  # units that a kernel's tiles are dealt to
    launch_s: Sourced  # shortest kernel, start to end, on the device
    dispatch_s: Sourced  # host time to issue one kernel
    efficiency: Efficiency
    scale_up: ScaleUp
    nic_bytes_per_s: Sourced  # scale-out bandwidth per device
    nic_latency_s: Sourced
    nic_efficiency: Sourced
    devices_per_node: int
    host_link_bytes_per_s: Sourced  # PCIe or C2C to host memory, per device
    host_memory_bytes: Sourced  # per node
    host_memory_bytes_per_s: Sourced  # per node
    nvme_bytes: Sourced  # per node
    nvme_bytes_per_s: Sourced  # per node
    power_w: Sourced
    usd_per_hour: Sourced | None
    notes: str = ""
    generation: str = ""  # the family whose defaults the profile shares
    within_node: ScaleUp | None = None  # joins the scale-up domains of one node (bridged pairs over PCIe)
    bridge: ScaleUp | None = None  # an option that joins pairs; within_node then joins the pairs
    nic_transport: Transport | None = None

    def supports(self, dtype: str) -> bool:
        """Whether the part has a matrix rate for this dtype."""
        return dtype in self.peak_flop_per_s
