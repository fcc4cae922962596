"""DataStates-LLM: checkpoints are copied to the host while nothing changes what is copied.

What it does: the copy to host memory runs beside the next forward and backward, which leave weights and states as they are; from
    there it is stored in the background; ``planner goodput --checkpoint lazy``.
Saves: the wait for the copy, unless it takes longer than forward and backward.
Costs: host memory for the copy; a failure before it is stored loses one checkpoint more.
Assumes: the copy has the link to the host for itself.
Source: Maurya et al. 2024 (DataStates-LLM, arXiv:2406.10707) §4.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.costs.reliability import checkpoint_stall_s
from planner.technique import Figure, Technique


def _hidden(subject: Callable[..., float]) -> float:
    """Share of a copy that nothing waits for, where it takes as long as forward and backward, %."""
    n_bytes, link, store = 25e9, 25e9, 2e9
    compute_s = n_bytes / link
    waited = [float(subject(mode, n_bytes, store, link, compute_s)) for mode in ("async", "lazy")]
    return 100.0 * (1.0 - waited[1] / waited[0]) if waited[0] else 0.0


TECHNIQUE = Technique(
    key="datastates_llm",
    name="DataStates-LLM (lazy checkpoints)",
    slot=None,
    kind="objective",
    source="arXiv:2406.10707",
    summary="Checkpoints copied beside forward and backward",
    figures=(
        Figure(
            "share of the copy that overlaps with forward and backward, in which weights and states are immutable, %",
            100.0,
            1e-9,
            "Maurya et al. 2024 (arXiv:2406.10707), section 4.1: lazy non-blocking copies during immutable phases",
            _hidden,
        ),
    ),
    compose=checkpoint_stall_s,
)
