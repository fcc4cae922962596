"""A serving problem: which model, on which machines, for which traffic and promises, with which choices already made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.errors import Problem as Fault
from planner.errors import SpecError, did_you_mean
from planner.specs.cluster import Cluster
from planner.specs.model import Model
from planner.specs.speculation import Speculation
from planner.specs.stack import Stack
from planner.specs.traffic import Traffic

if TYPE_CHECKING:
    from planner.serving.launcher import ServingLauncher

__all__ = ["SERVING_OBJECTIVES", "ServeProblem"]

SERVING_OBJECTIVES = ("throughput", "usd", "energy")
_VOCAB = 0.02
"""Relative difference of vocabularies of one family: they are padded to different multiples."""


@dataclass(frozen=True, slots=True)
class ServeProblem:
    """One serving problem.

    Attributes:
        model, cluster, traffic, stack: the specifications.
        precisions: number formats of weights that the search may choose from.
        caches: the same of the cache.
        modes: compositions of pools that it may choose from: ``aggregated``, ``disaggregated``; or ``ping_pong``, ``static`` or
            ``offloaded``.
        fixed: knob → value that every plan must have.
        forbidden: globs over ``knob=value``, none of which a plan may match.
        explore: globs over ``slot=choice``, or ``all``: choices to search that are left aside otherwise.
        objective: what the ranking maximises: answers of all machines (``throughput``), or tokens per dollar or joule of those
            that a plan uses. At a given rate all of them are the least of devices, dollars or watts.
        usd_per_device_hour: price; None takes the device profile's.
        speculation: drafted tokens that plans may use; None: a token a step.
        others: further clusters, for pools on devices of several types.
        launcher: the engine whose abilities bound the space; None for no such bound.

    Raises:
        SpecError: two of them do not go together (all problems at once).
    """

    model: Model
    cluster: Cluster
    traffic: Traffic
    stack: Stack
    precisions: tuple[str, ...] = ("bf16",)
    caches: tuple[str, ...] = ("bf16",)
    modes: tuple[str, ...] = ("aggregated", "disaggregated")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    forbidden: tuple[str, ...] = ()
    objective: str = "throughput"
    usd_per_device_hour: float | None = None
    speculation: Speculation | None = None
    others: tuple[Cluster, ...] = ()
    explore: tuple[str, ...] = ()
    launcher: ServingLauncher | None = None

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise SpecError(faults)

    def _faults(self) -> Iterator[Fault]:
        if self.stack.serving is None:
            yield Fault("stack", f"{self.stack.name!r} trains", "the stack of a serving engine, such as vllm")
        if self.model.arch != "decoder":
            yield Fault(
                "model", f"{self.model.name} is of kind {self.model.arch}", "a decoder, which generates"
            )
        if self.objective not in SERVING_OBJECTIVES:
            hint = did_you_mean(self.objective, SERVING_OBJECTIVES)
            yield Fault("objective", repr(self.objective), f"one of {', '.join(SERVING_OBJECTIVES)}", hint)
        if self.speculation is not None and self.speculation.model is not None:
            draft, vocab = self.speculation.model, self.model.vocab
            if draft.arch != "decoder" or abs(draft.vocab / vocab - 1.0) > _VOCAB:
                found = f"{draft.name} has {draft.vocab:,} tokens, {self.model.name} {vocab:,}"
                yield Fault("draft", found, "a decoder with the same vocabulary")
        if self.speculation is not None and self.speculation.method == "mtp" and not self.model.mtp_layers:
            yield Fault(
                "draft", f"{self.model.name} has no prediction modules", "a model that has, or a draft model"
            )
        dense = any(block.moe is None for block in self.model.blocks.values())
        if self.speculation is not None and self.speculation.method == "eagle" and not dense:
            found = f"every layer of {self.model.name} has experts; a draft head's layer is a dense one"
            yield Fault("draft", found, "a model with dense layers, or another draft")
        if self.others and "disaggregated" not in self.modes:
            yield Fault(
                "cluster",
                "several clusters for one pool",
                "one cluster",
                "Leave --mode out, or plan each cluster.",
            )
        if self.others and self.traffic.concurrency is not None:
            yield Fault("concurrency", "is given for several clusters", "a rate, or neither")
        if len({cluster.name for cluster in self.clusters}) <= len(self.others):
            yield Fault("cluster", "the same cluster twice", "clusters of different devices")
        t = self.traffic
        positions = self.model.max_seq_len if self.model.learned_positions else math.inf
        if t.isl + t.osl > positions:
            found = f"{t.isl:,} tokens in and {t.osl:,} out, of {self.model.name}, whose table of positions ends at {positions:,}"
            room = int(positions) - t.osl
            hint = (
                f"At most {room:,} in fit beside {t.osl:,} out."
                if room > 0
                else "Shorten the answers as well."
            )
            yield Fault("isl", found, f"{positions:,} tokens together", hint)
        if t.osl == 1 and (self.others or not {"aggregated", "static", "offloaded"} & set(self.modes)):
            yield Fault(
                "osl",
                "1, an answer that ends with its prompt",
                "2 tokens or more of pools that generate",
                "One pool on one cluster answers them.",
            )
        if self.modes == ("offloaded",):
            asked = {
                "ttft_s": t.ttft_s,
                "tpot_s": t.tpot_s,
                "e2e_s": t.e2e_s,
                "rate_per_s": t.rate_per_s,
                "concurrency": t.concurrency,
            }
            if self.speculation is not None:
                yield Fault("draft", "is given for offloading, which drafts nothing", "no draft")
            for name in (name for name, value in asked.items() if value is not None):
                yield Fault(
                    name, "is given for offloading, which answers a block at a time", "no limit and no rate"
                )
            if any(block.moe for block in self.model.blocks.values()):
                yield Fault(
                    "model", f"{self.model.name} has experts", "a dense model, whose layers are all read"
                )
        price = self.usd_per_device_hour
        if price is not None and not (math.isfinite(price) and 0.0 < price <= 1e6):
            yield Fault("usd_per_device_hour", f"{price:g}", "a price above 0, at most 1e6")

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """All clusters."""
        return (self.cluster, *self.others)

    @property
    def machines_count(self) -> bool:
        """Whether what all machines answer is maximised, not what a device, dollar or joule does."""
        return self.objective == "throughput" and self.traffic.rate_per_s is None

    @property
    def usd_per_hour(self) -> float | None:
        """Price of a device and hour, if it is known."""
        if self.usd_per_device_hour is not None:
            return self.usd_per_device_hour
        price = self.cluster.device.usd_per_hour
        return None if price is None else float(price)
