"""DiLoCo: workers train on their own for hundreds of steps, then average what they have learnt with an outer momentum.

What it does: data parallelism stays inside a worker; every ``inner_steps`` steps the workers' weight changes are all-reduced, and
    Nesterov momentum applies their mean.
Saves: traffic between workers, divided by ``inner_steps``.
Costs: the weights of the last agreement and the outer momentum, 8 bytes per parameter; another algorithm, whose interval is
    bounded by quality.
Assumes: weight changes travel in fp32; workers wait for the all-reduce; one worker per scale-up domain unless ``sync_workers``
    says otherwise.
Source: Douillard et al. 2023 (arXiv:2311.08105) §2, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Array, Item, Ledger, Resident
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.synchronisation.local import (
    KNOBS,
    apart,
    local,
    outer_traffic,
    workers_checks,
)

_KEY = "diloco"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Averages between workers once in a while."""

    def exchange(weights: Resident, workers: Array) -> Iterable[Item]:
        yield outer_traffic(weights, ctx, "all_reduce", workers, _KEY)

    return local(ledger, ctx, _KEY, 2.0, exchange)


def _less(subject: Pass) -> float:
    """Bytes between 8 workers of one device each per step of data parallelism, over those with H = 500."""
    ledger, _ = figures.run(
        "synchronisation", subject, model="gpt2", dp=8, zero_stage="0", synchronisation=_KEY, sync_workers=8, inner_steps=500,
        cluster="a100-sxm-80gb:8x1",
    )  # fmt: skip
    dense = 4.0 * 2 * 7 / 8 * figures.parameters(ledger)
    return dense / figures.sent_bytes(
        ledger, lambda i: figures.between_replicas(i) and float(i.group.size.max()) > 1
    )


TECHNIQUE = Technique(
    key=_KEY,
    name="DiLoCo (local steps, outer momentum)",
    slot="synchronisation",
    choices=(_KEY,),
    source="arXiv:2311.08105",
    summary="Workers average every few hundred steps",
    knobs=(
        Knob(
            "synchronisation",
            "how often replicas agree, and who with whom",
            ("none", _KEY, "noloco", "co2", "neighbours"),
            "none",
        ),
        *KNOBS,
    ),
    figures=(
        Figure(
            "times less communication, 8 workers, H = 500",
            500.0,
            1e-6,
            "Douillard et al. 2023 (arXiv:2311.08105), abstract and section 3",
            _less,
        ),
    ),
    needs=("staleness",),
    valid=workers_checks,
    apply=apply,
    active=apart,
)
