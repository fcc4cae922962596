"""BPipe: 1F1B whose first stages park activations with the last ones, which hold few of their own.

What it does: stage i < p/2, which would hold p−i micro-batches, keeps ⌈(p+2)/2⌉ and sends the others' activations to
    stage p−1−i, which holds i+1; they come back for their backward.
Saves: memory of the first stages, and with it recompute, or smaller micro-batches.
Costs: what a stage saves travels out and back for every micro-batch, beside its compute.
Assumes: every stage pays for the traffic, which middle ones do not have; a pair is as far apart as the first and last
    stage; 1F1B's times otherwise.
Source: Kim et al. 2023 (BPipe, ICML, PMLR 202:16639) §3; Huang et al. 2024 (arXiv:2401.02088); Huang et al. 2025 (Obscura, USENIX
    ATC 2025) §9.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from planner.ledger import Collective, Group, Item, Ledger, Resident, times
from planner.schedule.order import ORDERS, Generator, generator_of
from planner.technique import Context, Figure, Technique

_1F1B = ORDERS["1f1b"]


def _held(p: int, m: np.ndarray, device: np.ndarray) -> np.ndarray:
    """What a stage keeps of its own, and what its partner has parked there."""
    most = -(-(p + 2) // 2)
    own, partners = np.minimum(m, p - device), np.minimum(m, device + 1)
    return np.asarray(np.minimum(own, most) + np.maximum(partners - most, 0))


ORDER = replace(_1F1B, name="bpipe", in_flight=_held, alike_in_order=False)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Sends out what a block saves while the next one runs, and fetches it while the one after it goes back."""
    pp = ctx.mesh.pp
    stride = ctx.mesh.group("pp").stride * np.maximum(pp - 1, 1)
    parked = [
        i for i in ledger.of(Resident, lifetime="micro_batch", tier="device") if i.pool == "activations"
    ]
    known = {id(item) for item in parked}

    def mark(item: Resident) -> Item | None:
        return item.but(tags=item.tags | {"parked"}) if id(item) in known else None

    pair = Group("pairs", np.where(pp > 2, 2.0, 1.0), stride)
    return ledger.edit(Resident, mark).add(_traffic(parked, pair))


def _traffic(parked: Iterable[Resident], pair: Group) -> Iterable[Item]:
    for saved in parked:
        for what, phase in (("evict", "forward"), ("load", "backward")):
            yield Collective(
                what=f"{saved.what}.{what}", block=saved.block, phase=phase, tags=saved.tags | {"balance"}, by="bpipe",
                source="ICML 2023 (Kim et al.)", track="balance", kind="point_to_point", group=pair,
                size=times(saved.size, f"{saved.bytes_per_element:g}"), dtype="fp8",  # bytes, one an element
            )  # fmt: skip


TECHNIQUE = Technique(
    key="bpipe",
    name="BPipe",
    slot="schedule",
    choices=("bpipe",),
    source="ICML 2023 (Kim et al.)",
    summary="1F1B whose first and last stages share their activations",
    figures=(
        Figure(
            "micro-batches held by the fullest of 8 stages: ⌈(p + 2)/2⌉",
            5.0,
            1e-9,
            "Huang et al. 2025 (Obscura, USENIX ATC 2025), section 9.3: micro-batches that BPipe retains at most",
            lambda order: _most(order),
        ),
    ),
    apply=apply,
    order=ORDER,
    searched=False,
    moves=("activations",),
    active=lambda ctx: ctx.mesh.pp > 2,
)


def _most(order: Generator | str) -> float:
    held = generator_of(order or "gpipe").in_flight
    assert held is not None
    return float(np.max(held(8, 32, np.arange(8))))
