"""Prefix tuning: trained keys and values that every query of a frozen model sees before its own.

What it does: every attention sees ``prefix_tokens`` more keys, whose keys and values are parameters of their own.
Saves: gradients, optimizer states, master weights and weight-gradient products of everything frozen, and their saved inputs.
Costs: scores and context of that many more keys.
Assumes: prefixes are trained directly (the paper's small network that makes them is dropped after training, and neglected); no
    context parallelism, whose ranks would all see them; 10 tokens unless given.
Source: Li, Liang 2021 (arXiv:2101.00190) §4.2.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.ledger import Array, Ledger, Resident
from planner.technique import Check, Context, Detail, Figure, Technique, whole_number
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.adaptation.frozen import freeze, trained_weights

_KEY = "prefix"
_TOKENS = "prefix_tokens"
_DEFAULT_TOKENS = 10  # of the paper's table-to-text experiments


def valid(ctx: Context) -> Iterable[Check]:
    """Keys and values to add to."""
    plain = all(
        block.attention is not None and not block.attention.latent for block in ctx.model.blocks.values()
    )
    yield Check("prefixes need attention with keys and values in every block", plain)
    yield Check("prefixes are not split over context-parallel ranks", ctx.mesh.cp == 1)


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Freezes every weight, lengthens the keys, adds the prefixes."""
    tokens = float(ctx.knobs.get(_TOKENS, _DEFAULT_TOKENS))
    sizes: dict[str, Array] = {"kv_seq": ledger.axes["kv_seq"] + tokens}
    added: list[Resident] = []
    for name, block in ctx.model.blocks.items():
        if block.attention is not None and f"visible@{name}" in ledger.axes:
            # What the mask left of the old keys, and all of the new ones.
            seen = ledger.axes[f"visible@{name}"] * ledger.axes["kv_seq"] + tokens
            sizes[f"visible@{name}"] = seen / sizes["kv_seq"]
            size = f"2*prefix_tokens*kv_heads@{name}*head_dim@{name}"
            added += trained_weights("prefix", name, size, _KEY)
    return freeze(ledger, ()).set_axes(prefix_tokens=tokens, **sizes).add(added)


def _trained(subject: Pass) -> float:
    """Trained parameters of GPT-2 medium with 10 tokens."""
    ledger, _ = figures.run(
        "adaptation", subject, model="gpt2-medium", seq=512, adaptation=_KEY, prefix_tokens=10
    )
    return 24 * sum(float(ledger.axes[i.size].flat[0]) for i in ledger.of(Resident, pool="gradients"))


TECHNIQUE = Technique(
    key="prefix_tuning",
    name="Prefix tuning",
    slot="adaptation",
    choices=(_KEY,),
    searched=False,
    asked=True,
    source="arXiv:2101.00190",
    summary="Trained keys and values before a frozen model's own",
    knobs=(
        Detail(
            _TOKENS,
            f"tokens of the trained prefix ({_DEFAULT_TOKENS} unless given)",
            read=whole_number,
            expected="a whole number from 1",
        ),
    ),
    figures=(
        Figure(
            "trained parameters of GPT-2 medium, 10 tokens: |P_idx| × dim(h_i) = 10 · (2·24·1024)",
            10 * 2 * 24 * 1024.0,
            1e-9,
            "Li, Liang 2021 (arXiv:2101.00190), section 4.2: keys and values of all layers; 0.1 % of the parameters",
            _trained,
        ),
    ),
    valid=valid,
    apply=apply,
)
