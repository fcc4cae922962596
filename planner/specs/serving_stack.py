"""What a serving engine adds to the hardware: host time per iteration, memory it keeps, its defaults and its kernels.

Part of a stack's file::

    [serving]
    iteration_s = { value = 1.0e-3, kind = "fitted", source = "…" }
    …

    [[kernels]]                      # the first rule that fits a kernel says what libraries call it
    operation = "attention"
    generations = ["hopper"]         # left out: any
    kernel = "sglang fa3"
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from planner.specs.device import Sourced
from planner.specs.load import Reader
from planner.specs.sourced import read_sourced

__all__ = ["KernelRule", "ServingSoftware", "read_kernel_rules", "read_serving"]


@dataclass(frozen=True, slots=True)
class KernelRule:
    """Which library's kernel an engine runs for an operation: its name as ``kernel_libraries.toml`` matches it."""

    operation: str
    kernel: str
    formats: tuple[str, ...] = ()
    generations: tuple[str, ...] = ()

    def fits(self, operation: str, label: str, generation: str) -> bool:
        """Whether the rule is for this operation and number format on a device of this generation."""
        return (
            operation == self.operation
            and (not self.formats or label in self.formats)
            and (not self.generations or generation in self.generations)
        )


@dataclass(frozen=True, slots=True)
class ServingSoftware:
    """Constants of a serving engine.

    Attributes:
        iteration_s: time of an iteration in which the device waits for the host: scheduling, preparing inputs, sampling.
        sequence_s: more of it per sequence of the batch.
        admission_s: time from a request's arrival until its prompt may run, and from its first token until the client has it.
        memory_fraction: of the device's memory, what weights, activations and cache may take together.
        reserved_bytes: what a process holds besides: context, libraries, captured graphs.
        block_tokens: tokens of one block of the cache.
        max_sequences: sequences in one batch, by default.
        chunk_tokens: tokens of one iteration, by default.
        graph_sequences: largest batch whose iteration is captured in a graph.
        headroom: fraction of a request's final length that the cache must hold when it is admitted; 1: it is never preempted.
    """

    iteration_s: Sourced
    sequence_s: Sourced
    admission_s: Sourced
    memory_fraction: Sourced
    reserved_bytes: Sourced
    block_tokens: Sourced
    max_sequences: Sourced
    chunk_tokens: Sourced
    graph_sequences: Sourced
    headroom: Sourced


def read_serving(reader: Reader | None) -> ServingSoftware | None:
    """The table ``[serving]`` of a stack; None where there is none."""
    if reader is None:
        return None
    values: dict[str, Any] = {field.name: read_sourced(reader, field.name) for field in fields(ServingSoftware)}
    reader.finish()
    return ServingSoftware(**values)


def read_kernel_rules(readers: list[Reader]) -> tuple[KernelRule, ...]:
    """The rules ``[[kernels]]`` of a stack, in order."""
    found = []
    for reader in readers:
        found.append(
            KernelRule(
                reader.text("operation"),
                reader.text("kernel"),
                reader.texts("formats", ()),
                reader.texts("generations", ()),
            )
        )
        reader.finish()
    return tuple(found)
