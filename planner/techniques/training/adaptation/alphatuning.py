"""AlphaTuning: frozen binary codes of every weight, and one trained scale per row of a matrix.

What it does: a matrix is a sum of 4 binary matrices, each with a scale per output row; the scales of the first are trained. Their
    gradients are row sums of the weight's gradient, which is therefore still computed, and dropped.
Saves: of 16 bits per weight all but 4, and every state of what is frozen.
Costs: widening of every matrix, forward and backward; scales of 16 bits per row and code.
Assumes: 4-bit codes; embedding, head and vectors stay as they are and frozen; the gradient of one block's weights is there while
    it is at work.
Source: Kwon et al. 2022 (arXiv:2210.03858) §3.
"""

from __future__ import annotations

from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Ledger, Matmul, Resident, times
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.adaptation.frozen import ENDS, narrow, trained_weights

_KEY = "alphatuning"
_BITS = 4.0


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Narrows weights to codes; trains the scales of their rows."""
    rows: dict[tuple[str, str], list[str]] = {}
    for item in ledger.of(Matmul, phase="weight"):
        if item.block not in ENDS:
            mesh = "expert" if "expert" in item.tags else "dense"
            rows.setdefault((item.block, mesh), []).append(times(item.n, item.groups))
    added: list[Item] = []
    for (block, mesh), sizes in rows.items():
        size = " + ".join(sizes)
        added += trained_weights("scales", block, size, _KEY, mesh)
        others = times(size, "3")  # of the other codes
        added.append(
            Resident(
                what="frozen_scales", block=block, tags=frozenset({"parameters", "frozen", mesh}), by=_KEY, size=others,
                bytes_per_element=4.0, pool="parameters", lifetime="always",
            )
        )  # fmt: skip

    def freeze(item: Resident) -> Item | None:
        if item.pool == "parameters":
            return item.but(tags=item.tags | {"frozen"})
        if item.pool == "gradients":
            width = dtype_bytes(ctx.format.activation)
            tags = (item.tags - {"gradients"}) | {"gradient"}
            return item.but(pool="workspace", lifetime="block", tags=tags, bytes_per_element=width, by=_KEY)
        return None

    ends = ledger.drop(
        lambda item: isinstance(item, Resident) and item.pool == "gradients" and item.block in ENDS
    )
    ends = ends.drop(lambda item: item.block in ENDS and item.phase == "weight")
    return narrow(ends.edit(Resident, freeze), ctx, _BITS / 8.0, _KEY).add(added)


def _scales(subject: Pass) -> float:
    """Trained scales of GPT-2 medium: rows of its matrices."""
    ledger, _ = figures.run("adaptation", subject, model="gpt2-medium", seq=512, adaptation=_KEY)
    return 24 * sum(float(ledger.axes[i.size].flat[0]) for i in ledger.of(Resident, pool="gradients"))


def _bits(subject: Pass) -> float:
    """Bits held per weight of a layer's matrices, without scales."""
    ledger, _ = figures.run("adaptation", subject, model="gpt2-medium", seq=512, adaptation=_KEY)
    held = [i for i in ledger.of(Resident, pool="parameters", block="dense") if "scales" not in i.what]
    return 8.0 * figures.total_bytes(ledger, held) / sum(float(ledger.axes[i.size].flat[0]) for i in held)


TECHNIQUE = Technique(
    key=_KEY,
    name="AlphaTuning (trained scales of binary codes)",
    slot="adaptation",
    choices=(_KEY,),
    searched=False,
    asked=True,
    source="arXiv:2210.03858",
    summary="4-bit frozen codes, one trained scale per row",
    figures=(
        Figure(
            "trained scales of GPT-2 medium, one per row of 9h rows in 24 layers",
            24 * 9 * 1024.0,
            1e-9,
            "Kwon et al. 2022 (arXiv:2210.03858), section 3.2: row-wise scales α₁; over 1,000x fewer than 355M parameters",
            _scales,
        ),
        Figure(
            "bits per weight of a layer",
            4.0,
            1e-6,
            "Kwon et al. 2022 (arXiv:2210.03858), abstract: 4-bit quantisation",
            _bits,
        ),
    ),
    apply=apply,
)
