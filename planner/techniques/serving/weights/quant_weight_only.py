"""Weight-only quantisation: 4- or 8-bit integers, widened to 16 bits inside the product.

What it does: linear layers and experts hold integers with a scale per group (128) or channel; the kernel widens them.
Saves: weights' bytes by 3.9 (4-bit) or 2 (8-bit): nearly all of it while the product waits for its weights.
Costs: nothing is saved once the product waits for the matrix units, which multiply 16-bit operands.
Assumes: fused kernels that read integers once (Marlin and its kin); attention, router and both ends stay in 16 bits (but for
    llama.cpp's k-quants, which store the output projection in 6).
Source: Frantar et al. 2022 (GPTQ, arXiv:2210.17323); Frantar et al. 2024 (MARLIN, arXiv:2408.11743); ggml-org/llama.cpp.
"""

from __future__ import annotations

from planner.technique import Figure, Knob, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass
from planner.techniques.serving.weights.formats import one_format

_HEADS = {"q4_k_m": "q6_k"}
"""llama.cpp, src/llama-quant.cpp: the output projection has more bits than the rest."""


def _bits(subject: Pass) -> float:
    """Bits per weight of a layer of Llama-2 70B in groups of 128."""
    ledger = runs.run("weights", subject, model="llama2-70b", weights="int4_wo")
    wide = runs.run("weights", runs.sixteen, model="llama2-70b")
    return (
        16.0 * runs.parameter_bytes(ledger, layers_only=True) / runs.parameter_bytes(wide, layers_only=True)
    )


TECHNIQUE = Technique(
    key="quant_weight_only",
    name="Weight-only PTQ family (W4A16, W8A16, W3A16): GPTQ, AWQ, RTN",
    slot="weights",
    job="serving",
    choices=("int4_wo", "int8_wo", "q4_k_m"),
    source="arXiv:2210.17323; arXiv:2408.11743",
    summary="Integer weights, widened inside the product",
    knobs=(Knob("weights", "number format of linear layers"),),
    figures=(
        Figure(
            "bits per weight with one 16-bit scale per 128",
            4.125,
            1e-6,
            "Frantar et al. 2024 (arXiv:2408.11743), section 5: 4-bit weights, groups of 128",
            _bits,
        ),
    ),
    apply=one_format("quant_weight_only", _HEADS),
)
