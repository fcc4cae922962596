"""Mobius: more stages than devices; a stage's weights visit the device once for all micro-batches of a step.

What it does: every device has several stages whose weights live in host memory; all micro-batches pass a stage before the next
    one comes up, forward and backward, in the order of a breadth-first pipeline.
Saves: weights on the device, save for two blocks' worth, and traffic: a stage comes up twice per step, not per micro-batch.
Costs: all micro-batches of a stage are in flight; weights over the host link twice per step, and once for the update.
Assumes: transfers are spread evenly over the step's work; devices have a host link each (its cross mapping is about shared
    ones).
Source: Feng et al. 2023 (Mobius, ASPLOS 2023) §3.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Item, Ledger, Resident, Transfer, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.parameter_offload.zero_infinity import trips_of
from planner.techniques.training.schedule import breadth_first
from planner.techniques.training.swap import Trip, host, swap

_KEY = "mobius"
ORDER = replace(breadth_first.ORDER, name=_KEY)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps weights on the host, brings them up once per step and direction."""
    trips = trips_of(ledger)

    def of_device(item: Resident) -> tuple[Trip, ...]:
        return trips(item) if item.tier == "device" else ()

    moved = swap(ledger.set_axes(visits=ctx.micro_batches), of_device, _KEY)

    def once(item: Transfer) -> Item | None:
        if item.by != _KEY or item.phase == "step":
            return None
        return item.but(size=times(item.size, "/visits"))

    return moved.edit(Transfer, once)


def _visits(subject: Pass) -> float:
    """Times that weights come up in a step of 8 micro-batches."""
    ledger, ctx = figures.run("schedule", subject, model="gpt2-xl", pp=4, schedule=_KEY, micro_batch_size=1)
    fetched = tuple(item for item in ledger.of(Transfer) if item.phase != "step")
    up = figures.transferred_bytes(replace(ledger, items=fetched)) * float(ctx.micro_batches[0])
    return up / (2 * figures.parameters(ledger))


TECHNIQUE = Technique(
    key=_KEY,
    name="Stages on the host (Mobius)",
    slot="schedule",
    choices=(_KEY,),
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
            of_pass=True,
        ),
    ),
    valid=host,
    apply=apply,
    order=ORDER,
    active=lambda ctx: ctx.mesh.pp > 1,
)
