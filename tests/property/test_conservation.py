"""Bytes are conserved: what a choice takes off the device lies in another tier, and what ranks share adds up to the whole.

Over every pair with such a choice on the meshes of the pairs' laws. Buffers for what is under way, and weights gathered for a
block at work, are no part of what is held.
"""

from __future__ import annotations

import numpy as np
import pytest

from planner.ledger import Ledger, Resident
from planner.solve.space import Choice
from tests.property.test_pairs import MESHES, OF_EXPERTS, PAIRS, Run, every_choice, named

SWAPS = ("optimizer_offload", "activation_offload", "parameter_offload")


def held_bytes(run: Run) -> np.ndarray:
    """Bytes of weights, gradients, states and saved activations in all tiers, per valid mesh; each block once."""
    ledger: Ledger = run.search.ledger(run.recipe, run.ctx, run.made)
    items = [
        item
        for item in ledger.of(Resident)
        if item.lifetime in ("always", "micro_batch") and item.pool not in ("buffers", "gathered")
    ]
    total = sum(
        np.broadcast_to(ledger.axes[item.size] * item.bytes_per_element, (len(MESHES),)) for item in items
    )
    return np.asarray(total)[run.valid]


def without(pair: dict[str, Choice], slot: str) -> dict[str, Choice]:
    return {name: choice if name != slot else every_choice()[slot][0] for name, choice in pair.items()}


@pytest.mark.parametrize("slot", SWAPS)
def test_what_leaves_the_device_is_held_elsewhere(slot: str) -> None:
    for pair in PAIRS:
        if slot not in pair:
            continue
        experts = 8 if OF_EXPERTS & pair.keys() else 0
        run, plain = Run(experts, pair, MESHES), Run(experts, without(pair, slot), MESHES)
        both = run.valid & plain.valid
        if not both.any():
            continue
        run.valid = plain.valid = both
        np.testing.assert_allclose(held_bytes(run), held_bytes(plain), rtol=1e-9, err_msg=named(pair))


@pytest.mark.parametrize("slot", SWAPS)
def test_versions_of_weights_multiply_wherever_weights_live(slot: str) -> None:
    """PipeDream's stash and 2BW's second version follow weights to host memory and drives (arXiv:2006.09503, section 2)."""
    for schedule in (choice for choice in every_choice()["schedule"] if choice.value in ("2bw", "pipedream")):
        for choice in every_choice()[slot][1:]:
            run = Run(0, {slot: choice, "schedule": schedule}, MESHES)
            ledger = run.search.ledger(run.recipe, run.ctx, run.made)
            weights = ledger.of(Resident, pool="parameters")
            single = [item for item in weights if item.lifetime == "always"]
            many = [item for item in weights if item.by in ("pipedream", "pipedream_2bw")]
            stashed = [item for item in weights if item.lifetime == "micro_batch"]
            assert (not single and stashed) if schedule.value == "pipedream" else len(single) == 2 * len(many)
