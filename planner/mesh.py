"""The device mesh: two views of the same ranks, and the groups that communicate in them.

Innermost first, ranks are ordered (tensor, context, data, pipeline) for attention and dense layers, and
(expert-tensor, expert, expert-data, pipeline) for experts; both views share the pipeline axis. This is Megatron's
default rank order ``tp-cp-ep-dp-pp`` with the expert mesh folded over the dense one (arXiv:2504.14960).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planner.ledger import Array, Group, Index

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
    _groups: dict[str, Group] = field(default_factory=dict, init=False)
    _counterparts: dict[int, tuple[Group, Group]] = field(default_factory=dict, init=False)
    _whole: tuple[Mesh, Index] | None = None

    @property
    def edp(self) -> Array:
        """Replicas of an expert."""
        replicas: Array = self.tp * self.cp * self.dp / (self.etp * self.ep)
        return replicas

    @property
    def devices(self) -> Array:
        """World size."""
        return self.tp * self.cp * self.dp * self.pp

    def group(self, name: str) -> Group:
        """A named group: ``tp cp dp pp dp_cp etp ep edp``; the same object every time, so that prices are shared."""
        if name not in self._groups:
            self._groups[name] = (
                Group(name, *_GROUPS[name](self))
                if self._whole is None
                else self.counterpart(self._whole[0].group(name), self._whole[1])
            )
        return self._groups[name]

    def take(self, index: Index) -> Mesh:
        """The mesh on the rows at ``index``."""
        tp, cp, dp, pp, ep, etp = (
            degree[index] for degree in (self.tp, self.cp, self.dp, self.pp, self.ep, self.etp)
        )
        return Mesh(tp, cp, dp, pp, ep, etp, (self, index))

    def counterpart(self, group: Group, index: Index) -> Group:
        """A group of the mesh that this one was taken from, on the rows at ``index``; the same object every time."""
        if id(group) not in self._counterparts:
            self._counterparts[id(group)] = group, group.take(index)
        return self._counterparts[id(group)][1]

    def subgroup(self, of: str, name: str, size: Array, *, inner: bool) -> Group:
        """Part of a group: its first ``size`` ranks (``inner``), or the ranks ``group/size`` apart."""
        if name not in self._groups:
            whole = self.group(of)
            stride = whole.stride if inner else whole.stride * (whole.size / size)
            self._groups[name] = Group(name, size, stride)
        return self._groups[name]


# Size and stride of each group; see the module's docstring for the two rank orders.
_GROUPS: dict[str, Callable[[Mesh], tuple[Array, Array]]] = {
    "tp": lambda mesh: (mesh.tp, np.ones(1)),
    "cp": lambda mesh: (mesh.cp, mesh.tp),
    "dp": lambda mesh: (mesh.dp, mesh.tp * mesh.cp),
    "dp_cp": lambda mesh: (mesh.dp * mesh.cp, mesh.tp),
    "pp": lambda mesh: (mesh.pp, mesh.tp * mesh.cp * mesh.dp),
    "etp": lambda mesh: (mesh.etp, np.ones(1)),
    "ep": lambda mesh: (mesh.ep, mesh.etp),
    "edp": lambda mesh: (mesh.edp, mesh.etp * mesh.ep),
}
