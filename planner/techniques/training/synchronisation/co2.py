"""CO2: local training whose agreement runs beside the next round of local steps.

What it does: as DiLoCo, but the all-reduce between workers takes all of the following ``inner_steps`` steps, and is applied one
    round late.
Saves: the wait for it, unless it takes longer than the round.
Costs: a third copy, of what is under way; updates that are one round old.
Assumes: the all-reduce is spread evenly over forward and backward work of the round; both slow each other as overlap does.
Source: Sun et al. 2024 (arXiv:2401.16265) §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from planner.ledger import Array, Collective, Item, Ledger, Resident, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.synchronisation.local import apart, local, outer_traffic, workers_checks

_KEY = "co2"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Averages beside the next round's work."""

    def exchange(weights: Resident, workers: Array) -> Iterable[Item]:
        whole = outer_traffic(weights, ctx, "all_reduce", workers, _KEY)
        for phase in ("forward", "backward"):
            yield replace(whole, phase=phase, track="outer", size=times(whole.size, "/round_parts"))

    ledger = ledger.set_axes(round_parts=2.0 * ctx.micro_batches)
    return local(ledger, ctx, _KEY, 3.0, exchange)


def _hidden(subject: Pass) -> float:
    """Share of the traffic between 128 workers that may run beside other work, %."""
    ledger, _ = figures.run(
        "synchronisation", subject, model="gpt2", dp=128, zero_stage="0", synchronisation=_KEY, sync_workers=128,
        cluster="a100-sxm-80gb:128x1",
    )  # fmt: skip

    def beside(item: Collective) -> bool:
        return figures.between_replicas(item) and item.track == "outer" and item.phase != "step"

    whole = figures.sent_elements(ledger, figures.between_replicas)
    return 100.0 * figures.sent_elements(ledger, beside) / whole


TECHNIQUE = Technique(
    key=_KEY,
    name="CO2 (local steps, agreement beside them)",
    slot="synchronisation",
    choices=(_KEY,),
    source="arXiv:2401.16265",
    summary="Workers average beside the next round of local steps",
    figures=(
        Figure(
            "communication of data parallelism that overlaps with computation, %: full overlap",
            100.0,
            1e-9,
            "Sun et al. 2024 (arXiv:2401.16265), abstract and section 3: full overlap by local updates and asynchrony",
            _hidden,
        ),
    ),
    needs=("staleness",),
    valid=workers_checks,
    apply=apply,
    active=apart,
)
