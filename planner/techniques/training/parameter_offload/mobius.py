"""Mobius: more stages than devices; a stage's weights visit the device once for all micro-batches of a step.

What it does: every device has several stages whose weights live in host memory; all micro-batches pass a stage before the next one
    comes up, forward and backward (``schedule=breadth_first``).
Saves: weights on the device, save for two blocks' worth, and traffic: a stage comes up twice per step, not per micro-batch.
Costs: all micro-batches of a stage are in flight; weights over the host link twice per step, and once for the update.
Assumes: transfers are spread evenly over the step's work; devices have a host link each (its cross mapping is about shared ones).
Source: Feng et al. 2023 (Mobius, ASPLOS 2023) §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Item, Ledger, Transfer, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.parameter_offload.zero_infinity import trips_of
from planner.techniques.training.swap import host, swap

_KEY = "mobius"


def valid(ctx: Context) -> Iterable[Check]:
    """A host, and an order in which a stage's micro-batches follow each other."""
    yield from host(ctx)
    yield Check("stages on the host need schedule=breadth_first", _by_stage(ctx))


def _by_stage(ctx: Context) -> bool:
    return str(ctx.knobs.get("schedule")) == "breadth_first"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps weights on the host, brings them up once per step and direction."""
    moved = swap(ledger.set_axes(visits=ctx.micro_batches), trips_of(ledger), _KEY)

    def once(item: Transfer) -> Item | None:
        if item.by != _KEY or item.phase == "step":
            return None
        return replace(item, size=times(item.size, "/visits"))

    return moved.edit(Transfer, once)


def _visits(subject: Pass) -> float:
    """Times that weights come up in a step of 8 micro-batches."""
    ledger, ctx = figures.run(
        "parameter_offload", subject, model="gpt2-xl", pp=4, parameter_offload="stages", micro_batch_size=1,
        schedule="breadth_first",
    )  # fmt: skip
    fetched = tuple(item for item in ledger.of(Transfer) if item.phase != "step")
    up = figures.transferred_bytes(replace(ledger, items=fetched)) * float(ctx.micro_batches[0])
    return up / (2 * figures.parameters(ledger))


TECHNIQUE = Technique(
    key=_KEY,
    name="Stages on the host (Mobius)",
    slot="parameter_offload",
    choices=("stages",),
    searched=False,  # for servers whose devices hold a fraction of the model
    source="ASPLOS 2023 (Feng et al.)",
    summary="A stage's weights visit the device once for all micro-batches",
    figures=(
        Figure(
            "visits of a stage's weights per step, whatever the micro-batches: forward and backward",
            2.0,
            1e-6,
            "Feng et al. 2023 (Mobius, ASPLOS 2023), section 3: stages are swapped in once for forward and once for backward",
            _visits,
        ),
    ),
    valid=valid,
    apply=apply,
)
