"""What a serving engine adds to the hardware: host time per iteration, memory it keeps, its defaults and its kernels.

Part of a stack's file::

    [serving]
    iteration_s = { value = 1.0e-3, kind = "fitted", source = "…" }
    …

    [serving.on.hopper]              # constants that differ on one generation of accelerators
    iteration_s = { value = 1.2e-3, kind = "fitted", source = "…" }

    [[kernels]]                      # the first rule that fits a kernel says what libraries call it
    operation = "attention"
    generations = ["hopper"]         # left out: any
    kernel = "sglang fa3"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from planner.specs.device import Sourced
from planner.specs.reader import Reader
from planner.specs.sourced import read_sourced

__all__ = ["KernelRule", "ServingSoftware", "read_kernel_rules", "read_serving"]


class KernelRule(NamedTuple):
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
        start_share: of the time that a kernel's start and the splitting of its contraction take alone, what an iteration pays:
            captured graphs start a kernel before the one before it has ended.
        call_share: the same of the small kernels that a library's call holds beside its main one: engines fuse most of them.
        prompt_slowdown: seconds of an iteration that holds prompt tokens, relative to its kernels' alone: it is not captured, and
            batches of prompts are uneven.
        experts_prompt_slowdown: the same again of models with experts: tokens of one text choose alike, and the kernels around
            experts are many.
        admission_s: time from a request's arrival until its prompt may run, and from its first token until the client has it.
        admission_token_s: more of it per token of the prompt: text becomes tokens, which are checked, hashed and sent on.
        compile_s: for which the first iteration that goes on with a prompt waits for its kernels to be compiled, where an engine
            has run none before and no one kept them.
        memory_fraction: of the device's memory, what weights, activations and cache may take together.
        free_fraction: of what is then left for the cache, what it takes (TensorRT-LLM gives its fraction of free memory).
        reserved_bytes: what a process holds besides: context, libraries, captured graphs.
        block_tokens: tokens of one block of the cache.
        max_sequences: sequences in one batch, by default.
        chunk_tokens: tokens of one iteration, by default.
        graph_sequences: largest batch whose iteration is captured in a graph; 0: the host issues every kernel.
        headroom: fraction of a request's final length that the cache must hold when it is admitted; 1: it is never preempted.
        prompts: ``beside`` generation in one iteration, or ``first``: in iterations of their own while generation waits.
        all_reduce: small messages go through kernels of the engine's ``own`` where the link allows it, or the ``library``'s.
        context_parallel: caches that it splits over tensor ranks: ``any`` that grows, ``latent`` ones, or ``none``.
    """

    iteration_s: Sourced
    sequence_s: Sourced
    start_share: Sourced
    call_share: Sourced
    prompt_slowdown: Sourced
    experts_prompt_slowdown: Sourced
    admission_s: Sourced
    memory_fraction: Sourced
    free_fraction: Sourced
    reserved_bytes: Sourced
    block_tokens: Sourced
    max_sequences: Sourced
    chunk_tokens: Sourced
    graph_sequences: Sourced
    headroom: Sourced
    admission_token_s: Sourced = field(default_factory=lambda: Sourced(0.0, "assumed", "planner-defaults"))
    compile_s: Sourced = field(default_factory=lambda: Sourced(0.0, "assumed", "planner-defaults"))
    prompts: str = "beside"
    all_reduce: str = "own"
    context_parallel: str = "none"
    on: Mapping[str, Mapping[str, Sourced]] = field(default_factory=dict)

    def on_generation(self, generation: str) -> ServingSoftware:
        """The engine with the constants that it has on one generation of accelerators."""
        constants: Mapping[str, Any] = self.on.get(generation, {})
        return replace(self, **constants)

    def admitted_s(self, prompt_tokens: Any) -> Any:
        """What a request spends around the engine, whose prompt has so many tokens, cached or not."""
        return float(self.admission_s) + float(self.admission_token_s) * prompt_tokens


def read_serving(reader: Reader | None) -> ServingSoftware | None:
    """The table ``[serving]`` of a stack; None where there is none."""
    if reader is None:
        return None
    values: dict[str, Any] = {
        name: read_sourced(reader, name, positive=name != "graph_sequences")
        for name in _CONSTANTS
        if name not in _OPTIONAL or reader.has(name)
    }
    prompts = reader.text("prompts", "beside", choices=("beside", "first"))
    all_reduce = reader.text("all_reduce", "own", choices=("own", "library"))
    context_parallel = reader.text("context_parallel", "none", choices=("any", "latent", "none"))
    on: dict[str, dict[str, Sourced]] = {}
    generations: Reader | None = reader.table("on", None)
    for generation in () if generations is None else generations.keys():
        assert generations is not None
        entry: Reader = generations.table(generation)
        present = set(entry.keys())
        on[generation] = {name: read_sourced(entry, name) for name in _CONSTANTS if name in present}
        entry.finish()
    reader.finish()
    return ServingSoftware(
        on=on, prompts=prompts, all_reduce=all_reduce, context_parallel=context_parallel, **values
    )


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


_WORDS = ("on", "prompts", "all_reduce", "context_parallel")
_OPTIONAL = ("admission_token_s", "compile_s")
_CONSTANTS = tuple(f.name for f in fields(ServingSoftware) if f.name not in _WORDS)
