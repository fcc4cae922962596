"""Speed per user against speed per device: every load of every candidate, and those that no other beats in both.

The time between tokens bounds nothing here, since it is what the front is about; a limit of the time to the first token does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.ledger import Array
from planner.serving.space import degrees_of

__all__ = ["Curve", "pareto"]

_POINTS = 24
_CLOSE = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Loads of some candidates, one entry each.

    Attributes:
        mode: ``aggregated`` or ``disaggregated``.
        per_user, per_device: output tokens per second of a user, and of a device; 0 where a limit is not kept.
        replicas: (entries, pools) replicas of each pool.
        rows: (entries, pools, degrees) their meshes.
        roles: of the pools.
    """

    mode: str
    per_user: Array
    per_device: Array
    replicas: Array
    rows: Array
    roles: tuple[str, ...]

    def point(self, index: int) -> dict[str, Any]:
        """One entry as JSON fields."""
        pools = [
            {
                "role": role,
                "replicas": int(self.replicas[index, pool]),
                "mesh": degrees_of(self.rows[index, pool]),
            }
            for pool, role in enumerate(self.roles)
        ]
        return {
            "mode": self.mode,
            "pools": pools,
            "output_tokens_per_s_per_device": float(self.per_device[index]),
            "output_tokens_per_s_per_user": float(self.per_user[index]),
        }


def pareto(curves: list[Curve]) -> list[Mapping[str, Any]]:
    """The entries that no other beats in both, most per device first; of near ones (a per cent), one."""
    if not curves:
        return []
    user = np.concatenate([curve.per_user for curve in curves])
    device = np.concatenate([curve.per_device for curve in curves])
    order = np.lexsort((-user, -device))
    order = order[device[order] > 0.0]
    fastest = np.maximum.accumulate(np.concatenate([[0.0], user[order]]))[:-1]
    front = order[user[order] > fastest * (1.0 + _CLOSE)]
    chosen: Array = np.unique(np.linspace(0, len(front) - 1, min(_POINTS, len(front))).round().astype(int))
    starts = np.cumsum([0, *(len(curve.per_user) for curve in curves)])
    points: list[Mapping[str, Any]] = []
    for index in front[chosen]:
        which = int(np.searchsorted(starts, index, side="right")) - 1
        points.append(curves[which].point(int(index - starts[which])))
    return points
