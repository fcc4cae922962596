"""AvgPipe: two pipelines on the same devices take turns, and their weights are averaged.

What it does: a device holds two replicas of its stage, each trained on batches of its own; while one pipeline flushes, the other
    works. After each update a replica is pulled towards the mean of both.
Saves: the bubble: a step takes m times the slowest stage.
Costs: a second copy of weights, gradients and states; a pass over both replicas per update; another algorithm (elastic averaging:
    --allow staleness).
Assumes: a step's micro-batches are one replica's batch, and enough of them to fill the other's flush; activations of one pipeline
    are in flight as with 1F1B, as one fills while the other drains.
Source: Chen et al. 2023 (AvgPipe, PPoPP 2023) §3; S. Zhang et al. 2015 (elastic averaging SGD, arXiv:1412.6651).
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Item, Ledger, Resident, Stream
from planner.schedule.order import ORDERS, Rule
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.schedule.rules import accepts

_KEY = "avgpipe"
_PASSES = 3.0  # of the weights: both replicas read, one written
ORDER = replace(
    ORDERS["1f1b"], name=_KEY, barrier=False, flushes=False, bound_s=None,
    rules=(Rule("micro_batches", "at least pp", lambda p, m: m >= p),),
)  # fmt: skip


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """A second replica's weights, gradients and states, and the pull of one towards the other."""
    added: list[Item] = []
    for item in ledger.of(Resident, lifetime="always"):
        if item.pool in ("parameters", "gradients", "optimizer"):
            added.append(item.but(what=f"{item.what}.second", by=_KEY))
        if item.pool == "parameters":
            added.append(
                Stream(
                    what=f"{item.what}.pull", block=item.block, phase="step", tags=item.tags | {"optimizer"}, by=_KEY,
                    size=item.size, bytes_per_element=_PASSES * item.bytes_per_element,
                )
            )  # fmt: skip
    return ledger.add(added)


def _replicas(subject: Pass) -> float:
    ledger, _ = figures.run("schedule", subject, model="gpt2-xl", schedule=_KEY, pp=8)
    one, _ = figures.run("schedule", lambda ledger, ctx: ledger, model="gpt2-xl", schedule="1f1b", pp=8)
    return figures.held_bytes(ledger) / figures.held_bytes(one)


TECHNIQUE = Technique(
    key=_KEY,
    name="AvgPipe (two pipelines, elastic averaging)",
    slot="schedule",
    choices=(_KEY,),
    source="PPoPP 2023 (Chen et al.)",
    summary="Two replicas of the pipeline fill each other's bubbles",
    figures=(
        Figure(
            "model states of two parallel pipelines on a device, over those of one",
            2.0,
            1e-9,
            "Chen et al. 2023 (PPoPP 2023), section 3: each of N parallel pipelines has a replica of the model",
            _replicas,
            of_pass=True,
        ),
    ),
    valid=accepts(ORDER, copies=True),
    apply=apply,
    order=ORDER,
    searched=False,
    needs=("staleness",),
    active=lambda ctx: ctx.mesh.pp > 1,
)
