"""Seconds of a serving replica's iteration, and bytes of its devices: the ledger of its composition through the engine.

One :class:`Iterations` holds one recipe on any number of meshes (rows). Asked for a batch per row, or with one mesh for any
number of batches, it re-sizes the ledger's axes and prices them together; nothing is interpolated and nothing loops over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.engine.block_table import tabulate
from planner.engine.pricer import Pricer
from planner.ledger import Array, Ledger, Resident
from planner.serving.composition import Composition, composition_axes, iteration_ledger
from planner.technique import SERVING_SLOTS, ServingContext, Technique, discover

__all__ = ["Footprint", "Iterations", "serving_choices"]

EMBEDDING, HEAD, BOUNDARY = "embedding", "head", "boundary"


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """Bytes of the fullest device of a replica, per row.

    Attributes:
        weights_bytes: weights.
        token_bytes: what a token leaves in caches that grow with the context.
        window_bytes: by window length, what a token leaves in caches that hold the last tokens only.
        sequence_bytes: what a sequence holds however long it is: states of recurrent mixers.
        copies: ranks of the replica that hold caches of requests of their own.
    """

    weights_bytes: Array
    token_bytes: Array
    window_bytes: Mapping[int, Array]
    sequence_bytes: Array
    copies: Array

    def cache_bytes(self, tokens: Array | float, block_tokens: float = 1.0) -> Array:
        """Bytes that one sequence of some length holds on a device, its last block whole."""
        blocks = np.ceil(np.asarray(tokens) / block_tokens) * block_tokens
        held = self.token_bytes * blocks + self.sequence_bytes
        for window, each in self.window_bytes.items():
            held = held + each * np.minimum(blocks, np.ceil(window / block_tokens) * block_tokens)
        return np.asarray(held)


class Iterations:
    """Iterations of one recipe on the meshes of a context.

    Args:
        ctx: model, machines, stack, meshes and knobs; every slot of :data:`~planner.technique.SERVING_SLOTS` has its value.
        pricer: shared between recipes on the same machines and stack.

    Attributes:
        prompt_slowdown: seconds of an iteration with prompts relative to its kernels' alone.
        step_tokens, accepted: tokens that a generating sequence passes through the model in an iteration, and that it gains.
    """

    step_tokens: float = 1.0
    accepted: float = 1.0

    def __init__(self, ctx: ServingContext, pricer: Pricer | None = None) -> None:
        self.ctx = ctx
        self.pricer = pricer or Pricer(ctx.cluster, ctx.stack)
        software = self.pricer.stack.serving
        assert software is not None
        self.software = software
        self.kinds = (*dict.fromkeys(name for name, _ in ctx.model.layers), EMBEDDING, HEAD, BOUNDARY)
        ledger = iteration_ledger(ctx.model)
        for technique in serving_choices(ctx.knobs):
            if technique.slot != "graphs":
                ledger = technique.apply(ledger, ctx)
        self._eager = ledger
        experts = any(block.moe is not None for block in ctx.model.blocks.values())
        self.prompt_slowdown = float(software.prompt_slowdown) * (
            float(software.experts_prompt_slowdown) if experts else 1.0
        )
        graphs = next((t for t in serving_choices(ctx.knobs) if t.slot == "graphs"), None)
        self._captured = None if graphs is None else graphs.apply(ledger, ctx)

    def widen(self, apply: Callable[[Ledger, ServingContext], Ledger]) -> None:
        """Adds what is no technique's to every iteration."""
        self._eager = apply(self._eager, self.ctx)
        self._captured = None if self._captured is None else apply(self._captured, self.ctx)

    def __call__(
        self,
        decodes: Array | float,
        context_tokens: Array | float,
        prefill_tokens: Array | float,
        prefill_context: Array | float,
    ) -> Array:
        """Seconds of an iteration; see :class:`~planner.serving.composition.Composition` for the arguments, which broadcast.

        A batch on a pipeline is one of as many as there are stages: the time is that of passing all of them.
        """
        batch = Composition(
            *np.broadcast_arrays(
                *(
                    np.asarray(x, dtype=np.float64)
                    for x in (decodes, context_tokens, prefill_tokens, prefill_context)
                )
            )
        )
        shape = batch.decodes.shape
        flat = Composition(
            *(
                x.reshape(-1)
                for x in (batch.decodes, batch.context_tokens, batch.prefill_tokens, batch.prefill_context)
            )
        )
        return self.seconds(flat).reshape(shape)

    def steps(self, osl: float) -> float:
        """Iterations that generate an answer of ``osl`` tokens behind its first."""
        return (osl - 1.0) / self.accepted

    def seconds(self, batch: Composition) -> Array:
        """Seconds per row."""
        rows = len(batch.decodes)
        graph = float(self.software.graph_sequences)
        small = (batch.prefill_tokens <= 0.0) & (batch.decodes / self.ctx.mesh.dp <= graph)
        if self._captured is None or not small.any():
            device_s = self._passed_s(self._eager, batch, rows)
        else:
            device_s = self._passed_s(self._captured, batch, rows)
            if not small.all():
                device_s = np.where(small, device_s, self._passed_s(self._eager, batch, rows))
        prompts = batch.prefill_tokens > 0.0
        device_s = np.where(prompts, device_s * self.prompt_slowdown, device_s)
        occupied = batch.decodes + batch.prefill_tokens > 0.0
        # Every stage issues each of as many batches as there are stages.
        return np.asarray(np.where(occupied, device_s + self.ctx.mesh.pp * self.host_s(batch), 0.0))

    def host_s(self, batch: Composition) -> Array:
        """Seconds that a stage's device waits for the host, per batch that it runs.

        Every attention rank has a scheduler of its own, which handles its own sequences (vLLM: ``DPEngineCoreProc``, SGLang:
        ``launch_dp_attention_schedulers``, TensorRT-LLM: a ``PyExecutor`` per rank); ranks of ``tp`` all handle the same ones.
        """
        decodes = np.maximum(batch.decodes / self.ctx.mesh.dp, np.minimum(batch.decodes, 1.0))
        sequences = decodes + np.minimum(batch.prefill_tokens, 1.0)
        return np.asarray(float(self.software.iteration_s) + float(self.software.sequence_s) * sequences)

    def sized(self, batch: Composition, *, captured: bool = True) -> Ledger:
        """The ledger of a batch."""
        ledger = self._captured if captured and self._captured is not None else self._eager
        return self._sized(ledger, batch)

    def _sized(self, ledger: Ledger, batch: Composition) -> Ledger:
        load, parts = self.ctx.traffic.expert_load_factor, int(self.ctx.knobs["micro_batches"])
        return ledger.set_axes(**composition_axes(self.ctx.model, self.ctx.mesh, batch, load, parts))

    def _passed_s(self, ledger: Ledger, batch: Composition, rows: int) -> Array:
        """Seconds for one batch to pass all layers; the stage with most layers paces every stage."""
        sized = self._sized(ledger, batch)
        kernels = replace(sized, items=tuple(i for i in sized.items if not isinstance(i, Resident)))
        table = tabulate(kernels, self.pricer, self.kinds, rows)
        layers = self._layers(table["forward_s"])
        by_kind = dict(zip(self.kinds, table["forward_s"], strict=True))
        return np.asarray(layers + by_kind[EMBEDDING] + by_kind[HEAD] + by_kind[BOUNDARY] * self.ctx.mesh.pp)

    def _layers(self, values: Array) -> Array:
        """A field of all layers together, as if every stage had as many as the one with most."""
        counts, pp = self.repeats(), self.ctx.mesh.pp
        total = float(sum(counts.values()))
        paced = np.ceil(total / pp) * pp / total
        return np.asarray(
            sum(values[self.kinds.index(name)] * count for name, count in counts.items()) * paced
        )

    def repeats(self) -> dict[str, int]:
        """Layers of every kind."""
        counts: dict[str, int] = {}
        for name, repeat in self.ctx.model.layers:
            counts[name] = counts.get(name, 0) + repeat
        return counts

    def footprint(self) -> Footprint:
        """Bytes of the fullest device of a replica."""
        ledger, mesh, model = self._eager, self.ctx.mesh, self.ctx.model
        one = Composition(*(np.ones(1) for _ in range(4)))
        axes = ledger.set_axes(**composition_axes(model, mesh, one)).set_axes(kv_seq=1.0).axes
        rows = len(mesh.tp)
        counts: Mapping[str, Any] = self.repeats()
        stage = np.ceil(sum(counts.values()) / mesh.pp) / sum(counts.values())
        weights, ends, token, sequence = (np.zeros(rows) for _ in range(4))
        window: dict[int, Array] = {}
        for item in ledger.of(Resident):
            n_bytes = axes[item.size] * item.bytes_per_element
            if item.pool == "parameters":
                if item.block in (EMBEDDING, HEAD):
                    ends = np.maximum(ends, n_bytes) if item.block == HEAD else ends + n_bytes
                    if item.block == HEAD:
                        continue
                else:
                    weights = weights + n_bytes * counts[item.block] * stage
            elif item.pool == "kv_cache":
                held = n_bytes * counts[item.block] * stage
                spec = model.blocks[item.block].attention
                if item.what == "ssm.state":
                    sequence = sequence + held
                elif spec is not None and spec.window:
                    window[spec.window] = window.get(spec.window, np.zeros(rows)) + held
                else:
                    token = token + held
        both = sum(
            axes[i.size] * i.bytes_per_element
            for i in ledger.of(Resident, pool="parameters")
            if i.block in (EMBEDDING, HEAD)
        )
        most = np.where(mesh.pp > 1, ends, both)
        return Footprint(weights + most, token, window, sequence, mesh.dp * np.ones(rows))


def serving_choices(knobs: Mapping[str, Any]) -> list[Technique]:
    """The techniques of a recipe, in slot order."""
    by_slot = {(t.slot, choice): t for t in discover("serving").values() for choice in t.choices}
    found = (by_slot.get((slot, str(knobs[slot]))) for slot in SERVING_SLOTS)
    return [technique for technique in found if technique is not None]
