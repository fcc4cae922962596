"""LAMB and LARS: updates scaled by the norms of a layer's weights and of its update, for large batches.

What it does: as Adam (LAMB) or SGD with momentum (LARS); before weights change, their norms and those of the update are taken.
Saves: nothing; larger batches train, which a job's global batch size says.
Costs: fp32 weights and updates are read once more.
Assumes: norms are reduced inside the update's kernels; between ranks that share a layer's states they are a few scalars.
Source: You et al. 2020 (LAMB, arXiv:1904.00962) Algorithm 2; You et al. 2017 (LARS, arXiv:1708.03888) Algorithm 1.
"""

from __future__ import annotations

from planner.ledger import Ledger, Stream
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.optimizer.update import update

_NORM_BYTES = 8.0  # fp32 weights and updates once more


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Adds moments, gradient norm and an update with norms of its own."""
    return update(ledger, ctx, "layerwise", extra_bytes=_NORM_BYTES)


def _moved(subject: Pass, optimizer: str) -> float:
    """Bytes that the update moves per parameter."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2-xl", optimizer=optimizer)
    kernels = [item for item in ledger.of(Stream, phase="step") if item.what.endswith("update")]
    return sum(
        float(ledger.axes[k.size].flat[0]) * k.bytes_per_element for k in kernels
    ) / figures.parameters(ledger)


TECHNIQUE = Technique(
    key="layerwise",
    name="Layer-wise adaptive rates (LAMB, LARS)",
    slot="optimizer",
    choices=("lamb", "lars"),
    source="arXiv:1904.00962",
    summary="Updates scaled by norms of weights and updates",
    figures=(
        Figure(
            "bytes that LAMB moves per parameter: AdamW's 12 read and written, gradient, weight; weight and update again",
            2 * 12.0 + 4.0 + 2.0 + 8.0,
            1e-9,
            "You et al. 2020 (arXiv:1904.00962), Algorithm 2: m, v and x change; ‖x‖ and ‖r + λx‖ are taken before",
            lambda subject: _moved(subject, "lamb"),
        ),
        Figure(
            "bytes that LARS moves per parameter: as LAMB, without the variance",
            2 * 8.0 + 4.0 + 2.0 + 8.0,
            1e-9,
            "You et al. 2017 (arXiv:1708.03888), Algorithm 1: v and w change; ‖w‖ and ‖g‖ are taken before",
            lambda subject: _moved(subject, "lars"),
        ),
    ),
    apply=apply,
)
