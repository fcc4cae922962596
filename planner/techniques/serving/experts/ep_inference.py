"""Expert parallelism of an iteration: experts are spread over ``ep`` ranks, each cut over ``etp``.

What it does: a rank works on the tokens that chose its experts, and reads those experts' weights only. Where all ranks hold the
    same tokens (one attention batch), partial sums are all-reduced; where attention ranks batch requests of their own (dp > 1)
    or share prompts (cp > 1), their tokens are gathered before the experts and scattered behind them.
Saves: weights of experts, divided by ep · etp.
Costs: the all-reduce of a network, or a gather and a reduce-scatter of all tokens; ranks wait for the busiest.
Assumes: routing is uniform and independent (expected distinct experts E(1 − (1 − k/E)^T)); the busiest rank's share follows from
    random routing, or is what the traffic says.
Source: Rajbhandari et al. 2022 (DeepSpeed-MoE, arXiv:2201.05596) §5; SGLang data-parallel attention (``dp_attention.py``).
"""

from __future__ import annotations

import numpy as np

from planner.ledger import Collective, Group, Item, Ledger, Matmul
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.experts.spread import mixtures, spread, whole_experts
from planner.techniques.serving.runs import Pass


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Cuts experts, lets products read busy experts only, adds what carries tokens."""
    mesh = ctx.mesh
    blocks = mixtures(ctx)
    if not blocks:
        return ledger
    ledger = spread(ledger, ctx, "ep_inference")
    owners = mesh.cp * mesh.dp  # ranks that have tokens of their own
    replica = Group("replica", mesh.tp * owners, np.ones(1))
    together, apart = (owners == 1).astype(float), (owners > 1).astype(float)
    ledger = ledger.set_axes(summed_experts=together, gathered_experts=apart * owners)
    own = ctx.stack.serving is None or ctx.stack.serving.all_reduce == "own"
    added: list[Item] = []
    for block in blocks:
        common = {
            "block": block, "tags": frozenset({"experts"}), "by": "ep_inference", "source": "arXiv:2201.05596",
            "dtype": ctx.format.activation,
        }  # fmt: skip
        tokens = "batch*residual_seq*hidden"
        added += [
            Collective(
                what="moe.all_reduce", kind="all_reduce", group=mesh.group("tp"), size=f"{tokens}*summed_experts", custom=own,
                **common,  # type: ignore[arg-type]
            ),
            Collective(
                what="moe.gather", kind="all_gather", group=mesh.group("dp_cp"), size=f"{tokens}*gathered_experts",
                **common,  # type: ignore[arg-type]
            ),
            Collective(
                what="moe.scatter", kind="reduce_scatter", group=replica, size=f"{tokens}*gathered_experts",
                **common,  # type: ignore[arg-type]
            ),
        ]  # fmt: skip
    return ledger.add(added)


def _distinct(subject: Pass) -> float:
    """Experts of a layer of DeepSeek-V3 whose weights 32 generating sequences read."""
    ledger = runs.run("experts", subject, model="deepseek-v3", decodes=32.0)
    item = next(item for item in ledger.of(Matmul, what="moe.fc1"))
    return float(np.ravel(ledger.axes[item.groups])[0])


TECHNIQUE = Technique(
    key="ep_inference",
    name="Expert parallel inference (AG/RS or A2A)",
    slot="experts",
    job="serving",
    choices=("gathered",),
    default=True,
    source="arXiv:2201.05596",
    summary="Experts spread over a replica's ranks; only chosen ones are read",
    knobs=(Knob("ep", "expert-parallel degree"), Knob("etp", "expert-tensor-parallel degree")),
    figures=(
        Figure(
            "experts that 32 tokens touch of 256 with 8 each: 256 (1 - (31/32)^32)",
            163.31,
            1e-4,
            "Rajbhandari et al. 2022 (arXiv:2201.05596), section 5: a batch reads the union of its tokens' experts; by counting",
            _distinct,
        ),
    ),
    valid=whole_experts,
    apply=apply,
)
