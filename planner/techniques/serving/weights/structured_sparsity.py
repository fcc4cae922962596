"""Two of every four weights are zero and left out: 16-bit values of the others, and where they stand.

What it does: linear layers and experts are pruned in one shot so that of every four neighbours two are zero; the kernel reads the
    two others and four bits that say where they stand.
Saves: 7/16 of the weights' bytes, and of the time to read them.
Costs: results change. Products of many tokens take what dense ones take: sparse matrix units promise twice the rate, and what
    libraries reach of it depends on the shape, so none of it is counted.
Assumes: fused kernels that read the compressed weights once; attention, router and both ends stay dense.
Source: Frantar and Alistarh 2023 (SparseGPT, ICML, arXiv:2301.00774); Mishra et al. 2021 (arXiv:2104.08378); PyTorch,
    torch/sparse/semi_structured.py.
"""

from __future__ import annotations

from planner.technique import Figure, Knob, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass
from planner.techniques.serving.weights.formats import one_format


def _share(subject: Pass) -> float:
    """Bytes of a layer of Llama-2 70B, of those of its dense weights."""
    ledger = runs.run("weights", subject, model="llama2-70b", weights="sparse24")
    wide = runs.run("weights", runs.sixteen, model="llama2-70b")
    return runs.parameter_bytes(ledger, layers_only=True) / runs.parameter_bytes(wide, layers_only=True)


TECHNIQUE = Technique(
    key="sparsegpt",
    name="SparseGPT 50–60 % one-shot, 2:4, 4:8",
    slot="weights",
    job="serving",
    choices=("sparse24",),
    source="arXiv:2301.00774; arXiv:2104.08378",
    summary="Two of every four weights, in 9 bits for 16",
    knobs=(Knob("weights", "number format of linear layers"),),
    figures=(
        Figure(
            "compressed bytes of 16-bit weights, of the dense ones",
            9.0 / 16.0,
            1e-4,  # norms are not compressed
            "pytorch/pytorch v2.1, torch/sparse/semi_structured.py: compression factor 9 (of 16) for float16 and bfloat16",
            _share,
        ),
    ),
    apply=one_format("sparsegpt"),
)
