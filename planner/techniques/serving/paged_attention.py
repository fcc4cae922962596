"""Paged KV memory: a request holds blocks for the tokens that it has, not for those that it may come to have.

What it does: nothing to the ledger; the simulator's pool gives out blocks as requests grow, prompts go first, and the latest
    request gives way when no block is left (its cache is computed again, or swapped to the host).
Saves: what reservations for the longest output leave empty.
Costs: half a block per request, and preemptions where requests grow beyond the pool.
Assumes: blocks of 16 tokens, vLLM's default; a prompt's blocks are taken at its admission.
Source: Kwon et al. 2023 (PagedAttention, SOSP, arXiv:2309.06180).
"""

from __future__ import annotations

from planner.technique import Figure, Technique

_SHAREGPT_PROMPT, _SHAREGPT_OUTPUT = 161.31, 337.99
_LONGEST = 2048


def _used(policy: str) -> float:
    """Fraction of the memory held by ShareGPT's requests that tokens fill; reserved for 2,048 tokens without a policy."""
    import numpy as np

    from planner.load.requests import Lengths, draw
    from planner.load.scheduler import KvPool, scheduler

    jobs = draw(Lengths(_SHAREGPT_PROMPT, _SHAREGPT_OUTPUT, 1.0, 1.0), 2_000, rate_per_s=1.0, seed=1)
    pool = KvPool()
    grows = policy and scheduler(policy).reserve == "prompt"
    stored = np.concatenate(
        [p + np.arange(o) for p, o in zip(jobs.prompt_tokens, jobs.output_tokens, strict=True)]
    )
    held = np.array([pool.blocks_of(int(s)) for s in stored]) * pool.block_tokens if grows else _LONGEST
    return float(np.sum(stored) / np.sum(np.broadcast_to(held, stored.shape)))


TECHNIQUE = Technique(
    key="paged_attention",
    name="vLLM PagedAttention",
    slot=None,
    job="serving",
    source="arXiv:2309.06180",
    summary="KV memory in blocks that requests take as they grow, with a watermark, and preemption by recompute or swap",
    figures=(
        Figure(
            "share of KV memory that holds tokens, ShareGPT's mean lengths, blocks of 16",
            0.963,
            0.03,
            "Kwon et al. 2023 (arXiv:2309.06180), figure 2: 96.3 %; lengths of figure 11: 161.31 and 337.99 tokens",
            _used,
        ),
    ),
    order="vllm",
)
