"""Vocabulary parallelism: every stage holds an equal part of the embedding and of the head.

What it does: the vocabulary is cut over the stages. The last layer's output goes to all of them, each computes its part of the
    logits and of their gradients, and the softmax's sums and the gradient of that output are reduced over all. 1F1B runs two
    forwards more before its first backward, which waits for these two barriers; V-Half does it over its two chunks.
Saves: time, where the head makes the last stage the slowest; its and the embedding's weights, states and logits there.
Costs: per micro-batch, the output to every stage and its gradient back, the embedding's output and gradient likewise, and two
    values per token in fp32; activations of two more micro-batches under 1F1B.
Assumes: traffic hides behind the head's own work, as far as that lasts; a part of a product takes that part of its time; a tied
    embedding keeps its second copy; under V-Half, the barriers fit the slots between backward and forward.
Source: Yeung et al. 2024 (arXiv:2411.05288) §4, §5; github.com/sail-sg/VocabularyParallelism, README.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from planner.ledger import Collective, Item, Ledger, times
from planner.schedule.order import DeviceOps, Generator, Placement, Shape, alternate, one_chunk
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.training.schedule.split_backward import hold_weight_inputs
from planner.techniques.training.schedule.zbv_controllable import V_HALF

_KEY = "vocab_parallel_pp"
_BARRIERS = 2  # each delays the first backward by a micro-batch


def valid(ctx: Context) -> Iterable[Check]:
    """There is a head to share, and nothing in it but a vocabulary."""
    yield Check("a model without a head has no vocabulary to share", bool(ctx.model.head and ctx.model.vocab))
    yield Check(
        "a head that predicts several tokens has layers, which stages cannot share", not ctx.model.mtp_modules
    )


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds what stages send each other for the ends that they share."""
    return ledger.set_axes(sharing=ctx.mesh.pp).add(_exchanges(ctx))


def _exchanges(ctx: Context) -> Iterator[Item]:
    """In the head's work, of which every stage does a part: what each of them sends is whole."""
    hidden, sums = "batch*residual_seq*hidden", "2*batch*residual_seq"
    width = ctx.format.activation
    for what, phase, kind, size, dtype in (
        ("vocabulary.embedded", "forward", "all_reduce", hidden, width),
        ("vocabulary.output", "forward", "all_gather", hidden, width),
        ("vocabulary.softmax_sums", "forward", "all_reduce", sums, "fp32"),
        ("vocabulary.output_gradient", "backward", "all_reduce", hidden, width),
        ("vocabulary.embedded_gradient", "backward", "all_gather", hidden, width),
    ):
        yield Collective(
            what=what, block="head", phase=phase, by=_KEY, tags=frozenset({"pipeline", "vocabulary"}), source="arXiv:2411.05288",
            track="vocabulary", kind=kind, group=ctx.mesh.group("pp"), size=times(size, "sharing"), dtype=dtype,
        )  # fmt: skip


def _device_ops(shape: Shape, device: int) -> DeviceOps:
    k = np.arange(shape.m)
    stage = np.full(shape.m, device)
    return alternate((stage, k), (stage, k), shape.p - 1 - device + _BARRIERS)


SHARED_1F1B = Generator(
    "1f1b_vocab", _device_ops, lambda shape: 2, problems=one_chunk, placement=Placement(shared_ends=True), alike_in_order=True,
    in_flight=lambda p, m, device: np.minimum(m, p - device + _BARRIERS),
    saturates=lambda p, v, m: np.minimum(m, p + _BARRIERS),
)  # fmt: skip
SHARED_V_HALF = replace(V_HALF, name="v_half_vocab", placement=Placement(folded=True, shared_ends=True))

_README = "github.com/sail-sg/VocabularyParallelism, README, comparison of schedules"

TECHNIQUES = (
    Technique(
        key=_KEY,
        name="Vocabulary parallelism under 1F1B",
        slot="schedule",
        choices=("1f1b_vocab",),
        source="arXiv:2411.05288",
        summary="Embedding and head shared by all stages",
        figures=(
            Figure(
                "micro-batches held by the first of 8 devices, two barriers: p + 2",
                10.0,
                1e-9,
                _README,
                lambda order: figures.in_flight(order, 8, 32),
            ),
        ),
        valid=valid,
        apply=apply,
        apart=True,
        order=SHARED_1F1B,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
    Technique(
        key="vocab_parallel_v_half",
        name="Vocabulary parallelism under V-Half",
        slot="schedule",
        choices=("v_half_vocab",),
        source="arXiv:2411.05288",
        summary="Embedding and head shared by all stages, with half of 1F1B's activations",
        figures=(
            Figure(
                "chunks held by any of 48 devices, of which 1F1B's first holds 96: one half",
                48.0,
                0.08,
                "github.com/sail-sg/zero-bubble-pipeline-parallelism, README, comparison of schedules, F = B = W",
                lambda order: figures.in_flight(order, 48, 192, 2, None),
            ),
        ),
        valid=valid,
        apply=lambda ledger, ctx: hold_weight_inputs(apply(ledger, ctx), ctx),
        apart=True,
        order=SHARED_V_HALF,
        searched=False,
        active=lambda ctx: ctx.mesh.pp > 1,
    ),
)
