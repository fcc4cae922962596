"""G10: tensors leave for host memory or drives as soon as they rest, and are back before they are needed.

What it does: chooses which tensors rest outside, in which tier, when they leave and from when on there is room for their return,
    on a clock with one link out and one back per tier; ``planner solve tiers --moves scheduled``.
Saves: device memory, as SwapAdvisor; kernels wait only for moves that the gaps between uses are too short for.
Costs: link traffic; the wait for what comes late.
Assumes: kernels in a given order and of given length; moves of whole tensors, first come first served on a link.
Source: Zhang et al. 2023 (G10, MICRO 2023, arXiv:2310.09443), abstract; the authors' code (github.com/platformxlab/G10).
"""

from __future__ import annotations

from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.solvers import solver

TECHNIQUE = Technique(
    key="g10",
    name="G10",
    slot=None,
    kind="solver",
    source="arXiv:2310.09443",
    summary="Moves between memory tiers on a clock, ahead of their use",
    figures=(
        Figure(
            "stall time of 20 requests with room for 4 pages, the first 4 at hand, 4 units a fetch: the optimum",
            9.0,
            1e-9,
            "Dürr, Offline prefetching (webia.lip6.fr/~durrc/prefetch), after Albers, Garg, Leonardi 2000 (J. ACM 47(6))",
            lambda subject: figures.stall_s(subject, "abhdcbabddechhbgcdcg", frames=4, fetch_s=4.0),
        ),
    ),
    solve=solver("migrations.migrate", "time_s"),
    naive=solver("migrations.migrate_all", "time_s"),
)
