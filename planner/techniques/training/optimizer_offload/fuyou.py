"""Fuyou: states on NVMe, updated block by block beside the backward.

What it does: as ``nvme``, but a block's update starts when its last gradients are on the host: its states are read, updated and
    written back while the device goes on with the backward of the blocks before it.
Saves: as ``nvme``; and the wait for drives and host, as far as the last micro-batch's backward lasts.
Costs: the slowest of drives, host memory and host link, in the shadow of the backward; the last block's update after it.
Assumes: as ``cpu+overlapped`` and ``nvme``; the swap of activations is a choice of its own (``activation_offload=nvme``), where
    the authors balance its amount against the rest.
Source: Liao et al. 2024 (Fuyou, arXiv:2403.06504) §3.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ledger import Ledger, Transfer
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer_offload import zero_infinity_states
from planner.techniques.training.optimizer_offload.beside_backward import beside_backward

_KEY = "fuyou"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states, update and gradients to the drives, and the update beside the backward."""
    return beside_backward(zero_infinity_states.apply(ledger, ctx), _KEY)


def _after_the_backward(subject: Pass) -> float:
    """Share of the update's bytes over the drives that waits for the end of the backward."""
    ledger, _ = figures.run(
        "optimizer_offload", subject, model="gpt2-xl", precision="fp16", optimizer_offload="nvme+overlapped"
    )
    moved = ledger.of(Transfer, tier="nvme", phase="step")
    serial = [item for item in moved if not item.window]
    whole, part = (
        figures.transferred_bytes(replace(ledger, items=tuple(i)), "nvme") for i in (moved, serial)
    )
    return 1.0 - part / whole if whole else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Updates from NVMe beside the backward (Fuyou)",
    slot="optimizer_offload",
    choices=("nvme+overlapped",),
    searched=False,  # as nvme
    source="arXiv:2403.06504",
    summary="States live on drives; each block is updated while the backward goes on",
    figures=(
        Figure(
            "share of the update's traffic over the drives that overlaps with the backward: all of it",
            1.0,
            1e-9,
            "Liao et al. 2024 (Fuyou, arXiv:2403.06504), section 3: synchronous updates overlapped with the backward",
            _after_the_backward,
        ),
    ),
    by_row=True,
    moves=("optimizer", "gradients"),
    saves=True,
    valid=zero_infinity_states.valid,
    apply=apply,
)
