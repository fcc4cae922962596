"""How much device time a step takes at least, on any number of devices: its kernels alone, at their best.

Kernels are priced by the engine on one unsharded row with a micro-batch so large that tiles, waves, launches and weight traffic
cost nothing. Sharding cuts that work and repeats some of it, a smaller micro-batch runs it less efficiently, and collectives,
bubbles and the optimizer come on top; a step is no shorter than the mean work of its devices.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.engine.block_table import tabulate
from planner.ledger import Kernel
from planner.pipeline.composer import phase_seconds
from planner.solve.row_floor import ENDLESS, ROUNDING
from planner.solve.space import DEGREES, Rows
from planner.solve.uniform import UniformSearch
from planner.specs.problem import Problem
from planner.technique import Context, Technique

__all__ = ["kernel_floor_s"]


def kernel_floor_s(problem: Problem) -> float:
    """Device-seconds (seconds times devices) that one optimizer step takes at least, whatever the number of devices.

    The cluster's device decides, its size and its network do not.

    Raises:
        SpecError: a fixed or forbidden choice is unknown.
    """
    free = {name: value for name, value in problem.fixed.items() if name not in DEGREES}
    search = UniformSearch(replace(problem, fixed=free), 1, lambda batch: [s.bound_s for s in batch])
    rows = Rows({name: np.array([ENDLESS if name == "micro_batch_size" else 1.0]) for name in DEGREES})
    each = np.array([search.blocks[kind] for kind in search.kinds])
    least_s = np.inf
    for recipe in search.space.prefixes():
        ctx = rows.context(problem, search.space.knobs(recipe))
        if any(_repeats(choice.technique, ctx) for slot, choice in recipe.items() if slot not in free):
            continue
        ledger = search.ledger(recipe, ctx)
        kernels = ledger.drop(lambda item: not isinstance(item, Kernel))
        forward, backward, _ = phase_seconds(tabulate(kernels, search.pricer, search.kinds, 1))
        least_s = min(least_s, float(each @ (forward + backward)[:, 0]))
    return problem.workload.global_batch_size * least_s / ENDLESS * (1.0 - ROUNDING)


def _repeats(technique: Technique | None, ctx: Context) -> bool:
    """Whether a technique is about ranks that work together, and so does nothing on one."""
    return technique is not None and technique.active is not None and not np.any(technique.active(ctx))
