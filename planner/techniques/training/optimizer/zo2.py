"""MeZO and ZO2: the loss of two forwards with opposite random perturbations says how far to go along the perturbation.

What it does: a second forward takes the backward's place; nothing is saved for it, and there are no gradients. Perturbations are
    made anew from a seed. With ``parameter_offload=cpu`` it is ZO2: blocks come up from the host, run both forwards, and go back.
Saves: gradients, states, master weights, saved activations: 2 bytes per parameter and one block's tensors remain.
Costs: a third less work per step than with a backward, but many times the steps; weights are perturbed three times and updated
    once, a read and a write each.
Assumes: how many more steps it takes is the user's to say; replicas exchange a number, which takes no time.
Source: Malladi et al. 2023 (MeZO, arXiv:2305.17333) Algorithm 1; Wang et al. 2025 (ZO2, arXiv:2503.12668) §4.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Resident, Stream
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer.update import trained
from planner.techniques.training.zero_stage.states import with_degrees

_KEY = "zo2"
_PASSES = 4.0  # perturbed forth, back past the start, and to it again; then updated


def valid(ctx: Context) -> Iterable[Check]:
    """One loss per step: micro-batches would each need perturbed weights again."""
    yield Check("zeroth-order steps need one micro-batch per step", ctx.micro_batches == 1)
    yield Check("zeroth-order steps need pp = 1", ctx.mesh.pp == 1)
    whole = ctx.knobs.get("adaptation", "none") == "none"
    yield Check("zeroth-order steps are modelled for all weights, not for adapters", whole)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Drops the backward and all that serves it; runs the forward twice."""

    def serves_backward(item: Item) -> bool:
        if isinstance(item, Resident):
            return item.pool in ("gradients", "optimizer") or "gradient" in item.tags
        return item.phase in ("backward", "weight", "step")

    def without_gradients(item: Resident) -> Item | None:
        if item.pool == "parameters":
            return item.but(tags=item.tags | {"frozen"})
        return item.but(lifetime="block", by=_KEY) if item.lifetime == "micro_batch" else None

    weights_of = trained(ledger)
    ledger = with_degrees(ledger, ctx).drop(serves_backward).edit(Resident, without_gradients)
    ledger = ledger.copy_to_phase(lambda item: item.phase == "forward", "backward", _KEY)
    width = dtype_bytes(ctx.format.activation)
    perturbations = [
        Stream(
            what=weights.what.replace("parameters", "perturb_and_update"), block=weights.block, phase="backward", by=_KEY,
            tags=frozenset({"optimizer", "update"}), size=weights.size, bytes_per_element=2.0 * _PASSES * width,
        )
        for weights in weights_of
    ]  # fmt: skip
    return ledger.add(perturbations)


def _per_token(subject: Pass) -> float:
    """FLOP per token and parameter of a layer's matrices."""
    ledger, _ = figures.run(
        "optimizer", subject, model="gpt3-175b", optimizer="mezo", attention_kernel="flash"
    )
    work = figures.flop(
        ledger, "forward", "backward", "weight", where=lambda item: "core_attn" not in item.tags
    )
    return work / (2048 * 12 * 12288.0**2)


def _on_device(subject: Pass) -> float:
    """Bytes held per parameter."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2-xl", optimizer="mezo", precision="fp16")
    return figures.held_bytes(ledger) / _weights(ledger)


def _rewritten(subject: Pass) -> float:
    """Bytes that a step reads and writes of 16-bit weights beside its forwards, per parameter."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2-xl", optimizer="mezo", precision="fp16")
    updates = [item for item in ledger.of(Stream, phase="backward") if "update" in item.tags]
    moved = sum(float(np.ravel(ledger.axes[item.size])[0]) * item.bytes_per_element for item in updates)
    return moved / _weights(ledger)


def _weights(ledger: Ledger) -> float:
    return sum(float(np.ravel(ledger.axes[i.size])[0]) for i in ledger.of(Resident, pool="parameters"))


TECHNIQUE = Technique(
    key=_KEY,
    name="Zeroth-order steps (MeZO, ZO2)",
    slot="optimizer",
    choices=("mezo",),
    source="arXiv:2503.12668",
    summary="Two perturbed forwards in place of forward and backward; with parameter offload, ZO2",
    figures=(
        Figure(
            "FLOP per token and parameter: two forwards of 2, instead of 6",
            4.0,
            1e-6,
            "Malladi et al. 2023 (arXiv:2305.17333), Algorithm 1; Wang et al. 2025 (arXiv:2503.12668), section 4",
            _per_token,
        ),
        Figure(
            "bytes held per parameter: 16-bit weights, as in inference",
            2.0,
            1e-6,
            "Malladi et al. 2023 (arXiv:2305.17333), abstract: the same memory footprint as inference",
            _on_device,
        ),
        Figure(
            "bytes of weights rewritten per parameter: perturbed three times and updated, each read and written in 16 bits",
            16.0,
            1e-6,
            "Malladi et al. 2023 (arXiv:2305.17333), Algorithm 1: PerturbParameters with ε, −2ε and ε, then the update",
            _rewritten,
        ),
    ),
    valid=valid,
    apply=apply,
)
