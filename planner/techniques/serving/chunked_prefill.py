"""Chunked prefill: prompts are cut to a budget of tokens and run beside the decodes, so that no decode waits for a whole prompt.

What it does: nothing to the ledger; an iteration takes every decode, and as many prompt tokens as its budget leaves.
Saves: stalls: an iteration lasts no longer than one of a full budget.
Costs: a prompt takes several iterations, each reads the weights, and a later chunk reads the cache of those before it.
Assumes: the decodes alone stay below the budget.
Source: Agrawal et al. 2024 (Sarathi-Serve, OSDI, arXiv:2403.02310); Holmes et al. 2024 (Dynamic SplitFuse, arXiv:2401.08671).
"""

from __future__ import annotations

from planner.technique import Figure, Technique

_BUDGET = 512


def _within_budget(policy: str) -> float:
    """Fraction of decoded tokens whose iteration is no longer than one of a full budget; whole prompts without a policy."""
    import numpy as np

    from planner.load.iteration_time import Affine
    from planner.load.requests import Lengths, draw
    from planner.load.scheduler import scheduler
    from planner.load.simulator import simulate

    price = Affine(12e-3, 90e-6, 0.0, 90e-6)
    rules = scheduler(policy or "orca", token_budget=_BUDGET if policy else None)
    run = simulate(draw(Lengths(2000, 200, 1.0), 2_000, rate_per_s=2.0, seed=1), price, rules)
    _, longest_s, tokens = run.decode_iteration_s
    within = longest_s <= price(0, 0, _BUDGET, 0) * (1.0 + 1e-9)
    return float(np.sum(tokens * within) / np.sum(tokens))


TECHNIQUE = Technique(
    key="chunked_prefill",
    name="Sarathi-Serve / Dynamic SplitFuse chunked prefill, stall-free batching",
    slot=None,
    job="serving",
    source="arXiv:2403.02310",
    summary="Prompts in chunks of a token budget beside all decodes: fixed point, chain and simulation",
    figures=(
        Figure(
            "tokens that wait no longer than for an iteration of a full budget, of all",
            1.0,
            1e-9,
            "Agrawal et al. 2024 (arXiv:2403.02310), section 4: stall-free batching",
            _within_budget,
        ),
    ),
    order="sarathi",
)
