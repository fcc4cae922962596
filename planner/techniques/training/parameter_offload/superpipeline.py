"""A window of layers (Superpipeline): some layers' weights stay on the device, the others visit it.

What it does: of a device's layers, ``resident_layers`` keep their weights there; the others live in host memory, and every layer
    brings up an even part of them, as much earlier as a layer takes.
Saves: weights of the layers that are not resident, save for two blocks' worth.
Costs: their weights over the host link, as with ``cpu``, spread over all layers: a window that is wide enough hides them.
Assumes: as ``cpu``; transfers are spread evenly over a device's layers.
Source: Abbasi et al. 2024 (Superpipeline, arXiv:2410.08791) §3.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.ledger import Ledger, Resident
from planner.technique import Check, Context, Detail, Figure, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.parameter_offload.zero_infinity import trips_of
from planner.techniques.training.swap import Trip, host, swap

_KEY = "superpipeline"
_LAYERS = "resident_layers"
_OUTSIDE = ("embedding", "head", "boundary")


def valid(ctx: Context) -> Iterable[Check]:
    """A host, and a window."""
    yield from host(ctx)
    yield Check("parameter_offload=window needs resident_layers", _LAYERS in ctx.knobs)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Keeps the weights of some layers on the host."""
    own = (ctx.model.n_layers + sum(repeat for _, repeat in ctx.model.encoder_layers)) / ctx.mesh.pp
    away = np.clip(1.0 - float(ctx.knobs.get(_LAYERS, 0)) / own, 0.0, 1.0)
    trips = trips_of(ledger)

    def of_a_layer(item: Resident) -> tuple[Trip, ...]:
        return () if item.block in _OUTSIDE else trips(item)

    return swap(ledger.set_axes(away=away, away_kept=1.0 - away), of_a_layer, _KEY, "away")


def _resident(subject: Pass) -> float:
    """Share of the layers' weights of GPT-2 XL (48 layers) that stay, 16 of them resident."""
    ledger, _ = figures.run(
        "parameter_offload", subject, model="gpt2-xl", parameter_offload="window", resident_layers=16
    )
    weights = [i for i in ledger.of(Resident, pool="parameters", block="dense") if i.lifetime == "always"]
    on_device = figures.total_bytes(ledger, [i for i in weights if i.tier == "device"])
    return on_device / figures.total_bytes(ledger, weights)


TECHNIQUE = Technique(
    key=_KEY,
    name="A window of resident layers (Superpipeline)",
    slot="parameter_offload",
    choices=("window",),
    searched=False,
    asked=True,  # the window is a detail of its own
    source="arXiv:2410.08791",
    summary="Weights of some layers stay, those of the others visit the device",
    knobs=(
        Detail(
            _LAYERS,
            "layers per device whose weights stay there (parameter_offload=window)",
            read=whole_number,
            expected="a whole number from 1",
            needed_by="parameter_offload=window",
        ),
    ),
    figures=(
        Figure(
            "share of the layers' weights on the device, k = 16 of 48 layers: k/L",
            16 / 48,
            1e-9,
            "Abbasi et al. 2024 (arXiv:2410.08791), section 3: k of the model's layers are on the GPU at a time",
            _resident,
        ),
    ),
    valid=valid,
    apply=apply,
)
