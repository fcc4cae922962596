"""SwapAdvisor: swaps of tensors that are planned on the graph, and run beside the kernels on streams of their own.

What it does: chooses for every rest of every tensor whether it is swapped out, so that the longest of kernels, link out and link
    in is as short as can be; ``planner solve tiers --moves overlapped``.
Saves: device memory, as AutoTM; the step is as long as its kernels as long as the links keep up.
Costs: link traffic. With kernels that wait for their tensors the same choice is AutoTM's.
Assumes: kernels in a given order, and memory without fragments, both of which the authors let evolve as well; links that are free
    whenever a tensor is.
Source: Huang et al. 2020 (SwapAdvisor, ASPLOS 2020, doi:10.1145/3373376.3378530), abstract.
"""

from __future__ import annotations

from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.solvers import solver

_PAGES = (1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5)


TECHNIQUE = Technique(
    key="swapadvisor",
    name="SwapAdvisor",
    slot=None,
    kind="solver",
    source="doi:10.1145/3373376.3378530",
    summary="Swaps beside the kernels, planned on the graph",
    figures=(
        Figure(
            "swaps in, first ones included, by furthest next use: 12 references of Belady's anomaly, room for 3",
            7.0,
            1e-9,
            "github.com/remzi-arpacidusseau/ostep-homework @6c6cfc7, vm-beyondphys-policy/paging-policy.py --policy=OPT: misses",
            lambda subject: figures.page_faults(subject, _PAGES, 3, "overlapped"),
        ),
    ),
    solve=solver("tiering.place", "time_s"),
    naive=solver("tiering.swap_all", "time_s"),
)
