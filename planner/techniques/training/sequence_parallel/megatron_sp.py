"""Megatron sequence parallelism: norms, dropouts and residuals sharded along the sequence over the tensor-parallel ranks.

What it does: turns every tensor-parallel all-reduce into a reduce-scatter and an all-gather around the sharded region.
Saves: the activations that tensor parallelism replicates (10sbh of 34sbh + 5as²b), and their kernels, divided by tp.
Costs: the same bytes on the wire, and one more all-gather per column-parallel input in the backward (the saved input is
    sharded), which runs beside the input gradient's product; gathered inputs of a sparse attention's indexer, which are kept;
    a small all-reduce per step of the gradients of norms and biases; where tensors begin with the batch, a copy beside every
    collective (``sequence_copies`` of the software stack).
Assumes: sequence divisible by tp.
Source: Korthikanti et al. 2022 (arXiv:2205.05198) §4.2; indexer: Megatron-LM ``experimental_attention_variant/dsa.py``;
    copies: PyTorch ``torch/distributed/_functional_collectives.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Item, Ledger, Matmul, Resident, Stream, role, times
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.tensor.weights import cut, partial_gradients


def valid(ctx: Context) -> Iterable[Check]:
    """Whole tokens per rank."""
    ranks = ctx.mesh.tp * ctx.mesh.cp
    yield Check(
        "sequence length not divisible by tp·cp (sequence parallel)", ctx.workload.seq_len % ranks == 0
    )
    if ctx.workload.encoder_seq_len:
        whole = ctx.workload.encoder_seq_len % ranks == 0
        yield Check("encoder length not divisible by tp·cp (sequence parallel)", whole)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Shards the residual stream; splits the all-reduces."""
    ledger = ledger.shard(residual_seq=ctx.mesh.tp, encoder_residual_seq=ctx.mesh.tp)
    items: list[Item] = []
    for item in ledger.items:
        if isinstance(item, Collective) and "tp_reduce" in item.tags:
            items += _split(item)
        else:
            items.append(item)

    def whole(axes: frozenset[str]) -> bool:
        # Gradients of gains per head dimension are summed already.
        return not cut(axes) and "head_dim" not in map(role, axes)

    # Norms, biases and replicated projections see their rank's part of the sequence.
    sums = partial_gradients(ledger, ctx, ctx.mesh.group("tp"), whole, "whole", "megatron_sp")
    gathers = list(_indexer_inputs(ledger, ctx))
    kept = [distant_input(item, ctx, "megatron_sp") for item in gathers]
    ledger = ledger.set_axes(distant=1.0 - 1.0 / ctx.mesh.tp)
    return replace(ledger, items=(*items, *_copies(items, ctx), *sums, *gathers, *kept))


def _copies(items: Iterable[Item], ctx: Context) -> Iterator[Stream]:
    """Tensors that are put together again behind a gather along their second dimension, and taken apart before a scatter."""
    copies = ctx.stack.sequence_copies
    for item in items if copies is not None else ():
        if (
            copies is not None
            and isinstance(item, Collective)
            and item.tags & {"tp_gather", "tp_regather", "tp_scatter"}
        ):
            yield Stream(
                what=f"{item.what}.copy", block=item.block, phase=item.phase, tags=item.tags | {"sequence_copy"},
                by="megatron_sp", size=item.size, bytes_per_element=2.0 * copies.value * dtype_bytes(item.dtype),
            )  # fmt: skip


def distant_input(gather: Collective, ctx: Context, by: str) -> Resident:
    """What a gathered input adds to its rank's own part, where it stays for the backward; needs the axis ``distant``."""
    wide = gather.block == "head" or ctx.format.block == 1  # the head's product is never quantised
    return Resident(
        what=gather.what.replace("all_gather", "distant_input"), block=gather.block, by=by,
        tags=(gather.tags - {"tp_gather", "tp_regather"}) | {"saved"}, size=times(gather.size, "distant"), pool="activations",
        bytes_per_element=dtype_bytes(ctx.format.activation) if wide else ctx.format.linear_input_bytes,
        lifetime="micro_batch",
    )  # fmt: skip


def _indexer_inputs(ledger: Ledger, ctx: Context) -> Iterator[Collective]:
    """All-gathers of what an indexer's products read, once per tensor; no gradient returns through them."""
    seen: set[tuple[str, str]] = set()
    for item in ledger.of(Matmul, phase="forward"):
        if {"indexer", "replicated"} <= item.tags and (item.block, item.k) not in seen:
            seen.add((item.block, item.k))
            yield Collective(
                what=f"{item.what}.all_gather", block=item.block, tags=(item.tags - {"gemm", "replicated"}) | {"tp_gather"},
                by="megatron_sp", kind="all_gather", group=ctx.mesh.group("tp"), size=times(item.k, item.m),
                dtype=ctx.format.activation,
            )  # fmt: skip


def _split(item: Collective) -> Iterator[Collective]:
    """The halves of an all-reduce, around the sharded region."""

    def half(kind: Any, tag: str, **fields: Any) -> Collective:
        what = item.what.removesuffix("all_reduce") + kind
        tags = (item.tags - {"tp_reduce"}) | {tag}
        return item.but(**{"kind": kind, "what": what, "tags": tags, "by": "megatron_sp", **fields})

    if item.phase == "forward":
        # Row-parallel output: scattered; its gradient is gathered before the backward products.
        yield half("reduce_scatter", "tp_scatter")
        yield half("all_gather", "tp_gather", phase="backward")
    else:
        # Column-parallel input: gathered forward, again for the weight gradient; its gradient is scattered.
        yield half("all_gather", "tp_gather", phase="forward")
        yield half("all_gather", "tp_regather", track="regather")
        yield half("reduce_scatter", "tp_scatter")


def _share(model: str, published: float) -> Figure:
    def compute(subject: Pass) -> float:
        case: dict[str, Any] = {
            "model": model,
            "seq": 2048,
            "tp": 8,
            "precision": "fp16",
            "sequence_parallel": "true",
        }
        alone, _ = figures.run("sequence_parallel", lambda ledger, ctx: ledger, **case)
        ledger, _ = figures.run("sequence_parallel", subject, **case)
        return 100 * figures.saved_bytes(ledger) / figures.saved_bytes(alone)

    where = "Korthikanti et al. 2022 (arXiv:2205.05198), Figure 7"
    return Figure(
        f"activations of {model}, t = 8, % of tensor parallelism alone", published, 2e-3, where, compute
    )


TECHNIQUE = Technique(
    key="megatron_sp",
    name="Megatron sequence parallelism",
    slot="sequence_parallel",
    choices=("true",),
    source="arXiv:2205.05198",
    summary="Residual stream sharded over the tensor-parallel ranks",
    knobs=(
        Knob(
            "sequence_parallel",
            "shard the residual stream over tp (gathered: and keep gathered inputs)",
            ("true", "gathered", "false"),
            "true",
        ),
    ),
    figures=(_share("gpt3-175b", 62.04), _share("mt-nlg-530b", 58.31)),
    valid=valid,
    apply=apply,
    active=lambda ctx: ctx.mesh.tp > 1,
)
