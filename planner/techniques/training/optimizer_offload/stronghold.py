"""STRONGHOLD: the host updates each block beside the backward of the blocks before it.

What it does: as ``cpu+gradients``, but a block's update starts when its last gradients are on the host, while the device goes on
    with the backward; its new weights go up at once. With ``parameter_offload=cpu`` the device holds a window of two blocks.
Saves: as ``cpu+gradients``; and the wait for the update, as far as the last micro-batch's backward lasts.
Costs: the host's arithmetic and its link, in the shadow of the backward; the last block's update after it.
Assumes: blocks of equal work; a norm over all gradients, if there is one, is checked after the update; cores enough to stay
    bandwidth-bound.
Source: Sun et al. 2022 (STRONGHOLD, doi:10.1109/SC41404.2022.00076) §III; artifact, github.com/strongh2/sc22-ae.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer_offload import gradients
from planner.techniques.training.optimizer_offload.beside_backward import beside_backward

_KEY = "stronghold"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Moves states, update and gradients to the host, and the update beside the backward."""
    return beside_backward(gradients.apply(ledger, ctx), _KEY)


def _largest(subject: Pass) -> float:
    """Parameters whose states fit 90 GB of host memory, weights included, with fp32 gradients."""
    ledger, _ = figures.run(
        "optimizer_offload",
        subject,
        model="gpt2-xl",
        precision="fp16",
        optimizer_offload="cpu+overlapped",
        parameter_offload="cpu",
    )
    whole, _ = figures.run("optimizer_offload", lambda ledger, ctx: ledger, model="gpt2-xl", precision="fp16")
    each = figures.held_bytes(ledger, tier="host") / figures.parameters(whole)
    return 90e9 / each if each else 0.0


TECHNIQUE = Technique(
    key=_KEY,
    name="Updates on the host beside the backward (STRONGHOLD)",
    slot="optimizer_offload",
    choices=("cpu+overlapped",),
    searched=False,  # it takes a host that keeps up with the backward
    source="doi:10.1109/SC41404.2022.00076",
    summary="Each block is updated on the host while the backward goes on",
    figures=(
        Figure(
            "parameters of the largest model in 90 GB of host memory",
            5.141e9,
            0.03,
            "Sun et al. 2022 (STRONGHOLD), artifact's README, case 2.1.1: 5.141 B on one 32 GB V100",
            _largest,
        ),
    ),
    by_row=True,
    moves=("optimizer", "gradients"),
    saves=True,
    valid=gradients.valid,
    apply=apply,
)
