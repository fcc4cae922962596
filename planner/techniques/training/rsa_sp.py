"""Ring self-attention (Li et al.): keys and values travel a ring, and every rank has its rows of the score matrix.

What it does: sequences are cut over ranks; attention passes keys, then values, from rank to rank; ``--preset rsa_sp`` is
    ``context=p2p`` with ``attention_kernel=eager``.
Saves: activations and scores, divided by the ranks, whatever the number of heads.
Costs: a score matrix that is stored, and what the ring moves.
Assumes: as ``context=p2p``; later kernels that store no scores are why nobody runs it any more.
Source: Li et al. 2021 (arXiv:2105.13120) §3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.technique import Figure, Technique
from planner.techniques import figures


def _ring(fixes: Mapping[str, Any]) -> float:
    """Elements that a rank of 8 passes on in the forward of a layer of GPT-2 XL, one sequence of 2,048."""
    ledger, _ = figures.recipe(model="gpt2-xl", cp=8, **{"context": "a2a", **fixes})
    return figures.sent_elements(ledger, lambda i: "cp" in i.tags and i.phase == "forward")


TECHNIQUE = Technique(
    key="rsa_sp",
    name="Ring self-attention",
    slot=None,
    kind="preset",
    source="arXiv:2105.13120",
    summary="Keys and values on a ring, scores stored",
    fixes={"context": "p2p", "attention_kernel": "eager"},
    figures=(
        Figure(
            "elements that keys and values pass on in the forward of a layer, 8 ranks: 2(c − 1)/c·bsh",
            2.0 * 7 / 8 * 2048 * 1600,
            1e-9,
            "Li et al. 2021 (arXiv:2105.13120), section 3.2: keys, then values, are passed N − 1 times",
            _ring,
        ),
    ),
)
