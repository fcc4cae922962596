"""(IA)³: trained vectors scale the keys, the values and the network's inner activations of frozen layers.

What it does: keys, values and what enters the network's second product are multiplied by a trained vector each.
Saves: gradients, optimizer states, master weights and weight-gradient products of everything frozen.
Costs: a pass over what is scaled, forward and backward, and a reduction over its tokens for the vector's gradient.
Assumes: what is scaled is kept for the backward anyway; layers of attention with keys and values, and one network.
Source: Liu et al. 2022 (arXiv:2205.05638) §3.3; BitFit, which trains biases instead, is Ben Zaken et al. 2022 (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.ledger import Item, Ledger, Resident, Stream, times
from planner.technique import Check, Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.adaptation.frozen import freeze, trained_weights

_KEY = "ia3"
_PASSES = (
    ("forward", 2.0),
    ("backward", 4.0),
)  # read, write; then gradient and value read, product written and summed


def valid(ctx: Context) -> Iterable[Check]:
    """Something to scale in every layer."""
    blocks = ctx.model.blocks.values()
    plain = all(b.attention is not None and not b.attention.latent and b.mlp is not None for b in blocks)
    yield Check("(IA)³ scales keys, values and one network of every layer", plain)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Freezes every weight; scales by trained vectors."""
    added = [new for name in ctx.model.blocks for new in _scales(name)]
    return freeze(ledger, ("fc2_input",)).add(added)


def _scales(block: str) -> Iterator[Item]:
    keys, inner = f"2*kv_heads@{block}*head_dim@{block}", f"ffn@{block}"
    yield from trained_weights("ia3", block, f"{keys} + {inner}", _KEY)
    for what, width in (("keys_and_values", keys), ("inner", inner)):
        for phase, passes in _PASSES:
            yield Stream(
                what=f"ia3.{what}", block=block, phase=phase, tags=frozenset({"activation", "adapter"}), by=_KEY,
                size=times(width, "batch*seq"), bytes_per_element=4.0 * passes,
            )  # fmt: skip


def _trained(subject: Pass) -> float:
    """Trained parameters of a layer of Llama 7B."""
    ledger, _ = figures.run("adaptation", subject, model="llama-7b", adaptation=_KEY)
    return sum(float(ledger.axes[i.size].flat[0]) for i in ledger.of(Resident, pool="gradients"))


TECHNIQUE = Technique(
    key="peft_family",
    name="(IA)³ (trained scales of activations)",
    slot="adaptation",
    choices=(_KEY,),
    searched=False,
    asked=True,
    source="arXiv:2205.05638",
    summary="Keys, values and inner activations of frozen layers scaled by trained vectors",
    figures=(
        Figure(
            "trained parameters of a layer, d_k = d_v = 4096, d_ff = 11008: d_k + d_v + d_ff",
            4096 + 4096 + 11008.0,
            1e-9,
            "Liu et al. 2022 (arXiv:2205.05638), section 3.3: L(d_k + d_v + d_ff) parameters for an L-layer encoder",
            _trained,
        ),
    ),
    valid=valid,
    apply=apply,
)
