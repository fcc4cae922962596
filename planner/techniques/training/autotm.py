"""AutoTM: in which memory every tensor rests between the kernels that use it.

What it does: chooses a tier for every rest of every tensor (device memory, host memory, CXL, NVMe), so that every tier's
    capacity holds at every kernel and moves take least; ``planner solve tiers``.
Saves: device memory, tensor by tensor, where the offload choices of a plan move whole classes of tensors.
Costs: the moves: serial, or beside the kernels with the busiest link for a limit.
Assumes: kernels need what they use in the first tier; a constant tensor keeps its copy outside.
Source: Hildebrand et al. 2020 (AutoTM, doi:10.1145/3373376.3378465) §3; tiers of ZeRO-Infinity, Rajbhandari et al. 2021
    (arXiv:2104.07857) §5.
"""

from __future__ import annotations

from planner.technique import Figure, Technique
from planner.techniques import figures
from planner.techniques.solvers import solver

_PAGES = (7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1)


TECHNIQUE = Technique(
    key="autotm",
    name="AutoTM",
    slot=None,
    kind="solver",
    source="doi:10.1145/3373376.3378465",
    summary="The tier of every tensor between its uses",
    figures=(
        Figure(
            "page faults of the optimal replacement, 20 references and 3 frames",
            9.0,
            1e-9,
            "Silberschatz, Galvin, Gagne, Operating System Concepts, 9th edition, section 9.4.3",
            lambda subject: figures.page_faults(subject, _PAGES, 3),
        ),
    ),
    solve=solver("tiering.place", "time_s"),
    naive=solver("tiering.swap_all", "time_s"),
)
