"""The device mesh: two views of the same ranks, and the groups that communicate in them.

Innermost first, ranks are ordered (tensor, context, data, pipeline) for attention and dense layers, and
(expert-tensor, expert, expert-data, pipeline) for experts; both views share the pipeline axis. This is Megatron's
default rank order ``tp-cp-ep-dp-pp`` with the expert mesh folded over the dense one (arXiv:2504.14960).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.ledger import Array, Group

__all__ = ["Mesh"]


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """Parallel degrees, arrays over rows. ``tp·cp·dp = etp·ep·edp`` on every pipeline stage."""

    tp: Array
    cp: Array
    dp: Array
    pp: Array
    ep: Array
    etp: Array
    _groups: dict[str, Group] = field(default_factory=dict)

    @property
    def edp(self) -> Array:
        """Replicas of an expert."""
        return self.tp * self.cp * self.dp / (self.etp * self.ep)

    @property
    def devices(self) -> Array:
        """World size."""
        return self.tp * self.cp * self.dp * self.pp

    def group(self, name: str) -> Group:
        """A named group: ``tp cp dp pp dp_cp etp ep edp``; the same object every time, so that prices are shared."""
        if name not in self._groups:
            one = np.ones(1)
            size, stride = {
                "tp": lambda: (self.tp, one),
                "cp": lambda: (self.cp, self.tp),
                "dp": lambda: (self.dp, self.tp * self.cp),
                "dp_cp": lambda: (self.dp * self.cp, self.tp),
                "pp": lambda: (self.pp, self.tp * self.cp * self.dp),
                "etp": lambda: (self.etp, one),
                "ep": lambda: (self.ep, self.etp),
                "etp_ep": lambda: (self.etp * self.ep, one),
                "edp": lambda: (self.edp, self.etp * self.ep),
            }[name]()
            self._groups[name] = Group(name, size, stride)
        return self._groups[name]

    def subgroup(self, of: str, name: str, size: Array, *, inner: bool) -> Group:
        """Part of a group: its first ``size`` ranks (``inner``), or the ranks ``group/size`` apart."""
        if name not in self._groups:
            whole = self.group(of)
            stride = whole.stride if inner else whole.stride * (whole.size / size)
            self._groups[name] = Group(name, size, stride)
        return self._groups[name]
