"""PipeDream-2BW: 1F1B without a flush, gradients of m micro-batches per update, and two versions of the weights.

What it does: micro-batches of the next update follow at once; those in flight while the weights change end on the version
    that they began with, so that two versions are enough once an update takes at least p micro-batches. Every gradient is
    one update late.
Saves: the bubble: a step takes m times the slowest stage.
Costs: a second version of the weights; gradients one update late (another algorithm: --allow staleness).
Assumes: nothing hides the gradient reduction and the update; the norm of gradients is not clipped across stages.
Source: Narayanan et al. 2021 (arXiv:2006.09503) §3.1. Its flushing variant is 1f1b.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Ledger, Resident
from planner.schedule.order import ORDERS, Rule
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.schedule.rules import accepts

ORDER = replace(
    ORDERS["1f1b"], name="2bw", barrier=False, flushes=False, bound_s=None,
    rules=(Rule("micro_batches", "at least pp", lambda p, m: m >= p),),
)  # fmt: skip


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """A second version of the weights, where the first one lives."""
    weights = ledger.of(Resident, pool="parameters", lifetime="always")
    return ledger.add(item.but(what=f"{item.what}.second", by="pipedream_2bw") for item in weights)


def _versions(subject: Pass) -> float:
    ledger, _ = figures.run("schedule", subject, model="gpt2-xl", schedule="2bw", pp=8)
    return figures.held_bytes(ledger, "parameters") / (2.0 * figures.parameters(ledger))


TECHNIQUE = Technique(
    key="pipedream_2bw",
    name="PipeDream-2BW",
    slot="schedule",
    choices=("2bw",),
    source="arXiv:2006.09503",
    summary="1F1B without a flush and with two versions of the weights",
    figures=(
        Figure(
            "weight versions: 2",
            2.0,
            1e-9,
            "Narayanan et al. 2021 (arXiv:2006.09503), section 3.1",
            _versions,
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
