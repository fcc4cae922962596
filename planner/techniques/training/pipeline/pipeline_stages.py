"""Pipeline parallelism: layers are cut into stages on different devices, micro-batches flow through them.

What it does: every device holds the layers of its stage; activations go to the next stage, their gradients back.
Saves: weights, states and activations per device, divided by pp.
Costs: b·s·h elements per hop and direction (divided by tp under sequence parallelism; the encoder's output travels along in
    an encoder–decoder); a second copy of a tied embedding on the last stage, and an all-reduce of its gradient between both
    ends; the bubble, which the schedule decides; logits of all micro-batches, where software returns its last stage's outputs.
Assumes: messages between stages are latency on the edge, not work on the device.
Source: Huang et al. 2019 (GPipe, arXiv:1811.06965); Narayanan et al. 2021 (arXiv:2104.04473) §3.2, §4.1; outputs:
    ``torch.distributed.pipelining``, which can be told to drop them since https://github.com/pytorch/pytorch/pull/165822.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Collective, Group, Item, Ledger, Resident, times
from planner.technique import Check, Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

BOUNDARY = "boundary"  # the pseudo-block that stands for one hop between neighbouring stages


def valid(ctx: Context) -> Iterable[Check]:
    """At least one layer per stage (the ends may hold an embedding or a head alone)."""
    layers = ctx.model.n_layers + sum(repeat for _, repeat in ctx.model.encoder_layers)
    yield Check("more pipeline stages than layers", ctx.mesh.pp <= layers + 2)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds what one hop carries, and the tied embedding's second copy."""
    pp = ctx.mesh.pp
    size = "batch*residual_seq*hidden" + " + batch*encoder_residual_seq*hidden" * bool(
        ctx.model.encoder_layers
    )
    added: list[Item] = [
        Collective(
            what=what, block=BOUNDARY, phase=phase, by="pipeline_stages", tags=frozenset({"pipeline"}), source="arXiv:2104.04473",
            kind="point_to_point", group=ctx.mesh.group("pp"), size=size, dtype=ctx.format.activation,
        )
        for what, phase in (("boundary.activation", "forward"), ("boundary.gradient", "backward"))
    ]  # fmt: skip
    if ctx.model.tied_embeddings and ctx.model.head and ledger.of(Resident, block="head", pool="gradients"):
        stride = ctx.mesh.group("pp").stride * np.maximum(pp - 1, 1)
        added.append(
            Collective(
                what="head.tied_gradient", block="head", phase="step", by="pipeline_stages", tags=frozenset({"tied"}),
                kind="all_reduce", group=Group("ends", np.where(pp > 1, 2.0, 1.0), stride), size="tied_copy*vocab*hidden",
                dtype=ctx.gradient_dtype,
            )
        )  # fmt: skip
        ledger = ledger.set_axes(tied_copy=(pp > 1).astype(float))
    return _stage_outputs(_stage_inputs(_stage_tensors(ledger.add(added), ctx), ctx), ctx)


def _stage_tensors(ledger: Ledger, ctx: Context) -> Ledger:
    """Inputs and outputs that the software holds besides per micro-batch in flight, dealt to a stage's layers."""
    count, layers = ctx.stack.stage_tensors, ctx.model.n_layers + sum(n for _, n in ctx.model.encoder_layers)
    if count is None:
        return ledger
    inputs = [item for item in ledger.of(Resident, lifetime="micro_batch") if item.what == "norm1.input"]
    held = [
        replace(i, what="stage.tensors", tags=i.tags - {"saved"}, size=times(i.size, "stage_tensors"))
        for i in inputs
    ]
    share = np.where(ctx.mesh.pp > 1, count.value * ctx.mesh.pp / layers, 0.0)
    return ledger.set_axes(stage_tensors=share).add(item.but(by="pipeline_stages") for item in held)


def _stage_inputs(ledger: Ledger, ctx: Context) -> Ledger:
    """What a stage receives (on the first, gradients) where every micro-batch of the step has a buffer, dealt to its layers."""
    if ctx.stack.habits["stage_inputs"] == "reused":
        return ledger
    layers = ctx.model.n_layers + sum(n for _, n in ctx.model.encoder_layers)
    inputs = [item for item in ledger.of(Resident, lifetime="micro_batch") if item.what == "norm1.input"]
    held = [
        i.but(
            what="stage.inputs",
            pool="buffers",
            lifetime="always",
            size=times(i.size, "stage_inputs"),
            by="pipeline_stages",
        )
        for i in inputs
    ]
    share = np.where(ctx.mesh.pp > 1, ctx.micro_batches * ctx.mesh.pp / layers, 0.0)
    return ledger.set_axes(stage_inputs=share).add(held)


def _stage_outputs(ledger: Ledger, ctx: Context) -> Ledger:
    """The last stage's outputs of all micro-batches, where the software returns them; a copy merges them when the step ends.

    By then no freed block is as large as the copy, so that an allocator keeps its memory beside all that is freed.
    """
    if ctx.stack.habits["stage_outputs"] == "dropped":
        return ledger
    held: list[Item] = []
    for item in ledger.of(Resident, block="head"):
        if item.what == "head.logits":
            output = item.but(
                what="stage.outputs", by="pipeline_stages", lifetime="always",
                size=times(item.size, "returned_outputs"), bytes_per_element=dtype_bytes(ctx.format.core),
            )  # fmt: skip
            held += output, output.but(what="stage.merged_outputs", lifetime="freed")
    returned = np.where(ctx.mesh.pp > 1, ctx.micro_batches, 0.0)
    return ledger.set_axes(returned_outputs=returned).add(held)


def _message(subject: Pass) -> float:
    """Elements that a stage of GPT-3 175B sends on, per micro-batch of one sequence."""
    ledger, _ = figures.run("pipeline", subject, model="gpt3-175b", seq=2048, pp=8)
    return figures.sent_elements(ledger, lambda item: item.block == BOUNDARY and item.phase == "forward")


TECHNIQUE = Technique(
    key="pipeline_stages",
    name="Pipeline parallelism",
    slot="pipeline",
    choices=("stages",),
    default=True,
    source="arXiv:1811.06965",
    summary="Layers cut into stages on different devices",
    knobs=(
        Knob("pp", "pipeline stages"),
        Knob("pipeline", "how a stage's output travels", ("stages", "scatter_gather"), "stages"),
        Knob(
            "pipeline_layout",
            "how layers are dealt to stages, by name or as the layers of each (19+2*21+19)",
            ("even", "short_ends", "short_first", "short_last", "balanced"),
        ),
    ),
    figures=(
        Figure(
            "elements between consecutive stages of GPT-3 175B per micro-batch: bsh",
            2048.0 * 12288,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2104.04473), section 3.2",
            _message,
        ),
    ),
    valid=valid,
    apply=apply,
)
