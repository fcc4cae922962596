"""A cache in blocks: what a sequence holds grows block by block, and no more is reserved.

What it does: keys and values lie in blocks of a few tokens, which a table finds.
Saves: what contiguous caches reserve for the longest possible answer.
Costs: half a block per sequence, on average, stays empty.
Assumes: paging takes no time; a request is admitted when its final length fits (the stack's ``headroom``).
Source: Kwon et al. 2023 (vLLM, arXiv:2309.06180) section 4.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.kv_cache import block_waste_tokens
from planner.technique import Figure, Technique


def _waste(subject: Callable[..., float]) -> float:
    """Tokens that stay empty in blocks of 16, per sequence."""
    return float(subject(16))


TECHNIQUE = Technique(
    key="paged_attention",
    name="vLLM PagedAttention",
    slot=None,
    job="serving",
    source="SOSP 2023",
    summary="The cache in blocks",
    figures=(
        Figure(
            "empty tokens per sequence with blocks of 16, a last block evenly full: (16 - 1) / 2",
            7.5,
            1e-9,
            "Kwon et al. 2023 (arXiv:2309.06180), section 4.3: waste is within one block",
            _waste,
        ),
    ),
    compose=block_waste_tokens,
)
