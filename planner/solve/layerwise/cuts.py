"""Schedules that layers are searched under, and how their stages may be cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.pipeline.layout import Layout, layouts
from planner.solve.layerwise.uneven import uneven_layout
from planner.solve.space import Choice, order_of
from planner.solve.uniform import UniformSearch

__all__ = ["SCHEDULES", "cuts", "name_of"]

SCHEDULES = ("1f1b", "gpipe", "interleaved")
"""Names of their orders."""


def cuts(uniform: UniformSearch, pp: int, named_only: bool) -> Iterator[tuple[Choice, Layout | None, int]]:
    """Schedules with their layouts; one stage per device is left open where cuts are."""
    space, order, kinds = uniform.space, uniform.order, uniform.kinds
    launcher = uniform.problem.launcher
    wanted = space.fixed.get("pipeline_layout", "")
    for schedule in space.choices["schedule"]:
        name = name_of(schedule)
        if name not in SCHEDULES or (pp == 1 and name != "1f1b" and "schedule" not in space.fixed):
            continue
        interleaved = name == "interleaved"
        for v in order_of(schedule).chunks((len(order) + 2) // pp if pp > 1 else 1):
            if not space.allows("virtual_stages", np.array([float(v)]))[0]:
                continue
            if v == 1 and not named_only and not wanted:
                yield schedule, None, v
                continue
            named = layouts(order, kinds, pp, v, wanted=wanted)
            if interleaved and not wanted and all(layout.split == "balanced" for layout in named):
                other = None if named_only else uneven_layout(order, kinds, pp, v)
                named = () if other is None else (other,)
            for layout in named:
                if launcher is None or launcher.takes_stages(layout.stages, pp):
                    yield schedule, layout, v


def name_of(schedule: Choice) -> str:
    """Name of a schedule's order."""
    return order_of(schedule).name
