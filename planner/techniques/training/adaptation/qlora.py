"""QLoRA: LoRA over weights that are held in 4 bits and widened where a product reads them.

What it does: as LoRA; the frozen weights of all layers are NF4 numbers in blocks of 64, whose scales are themselves 8-bit numbers
    with a scale per 256.
Saves: of 16 bits per frozen weight, all but 4.127.
Costs: widening of every matrix, forward and backward (again where a layer is recomputed).
Assumes: embedding and head stay in 16 bits; gathered weights travel in the format in use; paged optimizer states stay on the
    device.
Source: Dettmers et al. 2023 (arXiv:2305.14314) §3.
"""

from __future__ import annotations

from planner.costs.precision import dtype_bytes
from planner.ledger import Ledger, Resident
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.adaptation import lora
from planner.techniques.training.adaptation.frozen import narrow

_KEY = "qlora"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Freezes and narrows weights, adds the adapters."""
    return narrow(lora.apply(ledger, ctx), ctx, dtype_bytes("nf4_double"), _KEY)


def _gb(subject: Pass) -> float:
    """Frozen weights of the layers of LLaMA 65B, per parameter times 65e9."""
    ledger, _ = figures.run("adaptation", subject, model="llama-65b", adaptation=_KEY)
    layer = [i for i in ledger.of(Resident, pool="parameters", block="dense") if "adapter" not in i.what]
    return 65.0 * figures.total_bytes(ledger, layer) / sum(float(ledger.axes[i.size].flat[0]) for i in layer)


TECHNIQUE = Technique(
    key=_KEY,
    name="QLoRA (4-bit frozen weights)",
    slot="adaptation",
    choices=(_KEY,),
    searched=False,
    asked=True,
    source="arXiv:2305.14314",
    summary="LoRA over weights held in NF4 with doubly quantised scales",
    figures=(
        Figure(
            "GB of 65e9 weights at 4 + 8/64 + 32/(64·256) bits",
            65.0 * (4 + 8 / 64 + 32 / (64 * 256)) / 8,
            1e-6,
            "Dettmers et al. 2023 (arXiv:2305.14314), section 3: 4-bit NF4, double quantisation of 0.127 bits per parameter",
            _gb,
        ),
    ),
    apply=apply,
)
