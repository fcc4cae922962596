"""The linear relaxation of counts, by the simplex method: layers may be divided among strategies.

    minimise   z
    subject to offset_f + Σ x_gs·cost_f,gs ≤ z,   Σ x_gs·held_d,gs ≤ room_d,   Σ_s x_gs = n_g,   x ≥ 0.

A problem has a dozen rows and some hundred columns, so that a dense inverse of the basis is updated in microseconds. Whatever the
duals are, they bound: weights ``μ`` of the costs (which sum to 1) and prices ``λ`` of the budgets give

    Σ_g n_g·min_s (μ·cost_gs + λ·held_gs) + μ·offset − λ·room

(weak duality), so that neither rounding in the pivots nor an early end makes the bound wrong: where budgets seem too small, that
is taken for proved only if the duals bound the cost by more than any counts cost. What rounding makes of the sum itself is below
1e-12 of its parts (a thousand layers at 1e-16): a caller that adds that much to the room stays below every price.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.ledger import Array
from planner.solve.time_limit import ask

__all__ = ["Relaxed", "relaxed"]

_MOST_PIVOTS = 200
_OPTIMAL = 1e-11  # reduced cost of a column, in units of the dearest layer, that is taken for none
_SMALLEST_PIVOT = 1e-10
_EXCEEDED = 1e-9  # part of a budget by which counts may exceed it and still be taken to keep it
_BEYOND = 2.0  # times what any counts cost: more than rounding makes of it
_PENALTIES = (1e4, 1e8, 1e12)  # of a budget exceeded by its whole, in units of the dearest layer


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """The relaxation's answer.

    Attributes:
        bound: no counts that fit cost less; infinite where none do.
        weights: of the cost functions, which sum to 1.
        prices: of a byte of each budget; where nothing fits, such that what exceeds budgets costs much.
        shares: layers under each strategy, per group.
    """

    bound: float
    weights: Array
    prices: Array
    shares: list[Array]


def relaxed(
    sizes: Sequence[int], cost: Sequence[Array], held: Sequence[Array], offset: Array, room: Array
) -> Relaxed:
    """Solves the relaxation.

    Args:
        sizes: layers of every group.
        cost, held: per group, (functions, strategies) and (budgets, strategies) of one layer.
        offset, room: (functions) and (budgets).

    >>> cost, held = np.array([[10.0, 4.0]]), np.array([[1.0, 10.0]])
    >>> found = relaxed([5], [cost], [held], np.zeros(1), np.array([36.0]))
    >>> round(found.bound, 9), found.shares[0].round(9).tolist()  # 3.44 fast ones hold 34.44 bytes, 1.56 slow ones 1.56
    (29.333333333, [1.555555556, 3.444444444])
    """
    ask()
    tableau = _Tableau(sizes, cost, held, offset, room)
    fits = tableau.solve()
    weights, prices = tableau.duals()
    least = [n * float((weights @ c + prices @ h).min()) for n, c, h in zip(sizes, cost, held, strict=True)]
    bound = sum(least) + float(weights @ offset) - float(prices @ room)
    if not fits and bound > _BEYOND * _dearest(sizes, cost, offset):
        return Relaxed(np.inf, weights, prices * (_PENALTIES[0] / _PENALTIES[-1]), [])
    return Relaxed(bound, weights, prices, tableau.shares())


def _dearest(sizes: Sequence[int], cost: Sequence[Array], offset: Array) -> float:
    """No counts cost more: if those that fit cost more than this, none fit."""
    layers = sum(n * float(np.abs(c).max()) for n, c in zip(sizes, cost, strict=True))
    return layers + float(np.abs(offset).max())


class _Tableau:
    """Columns of layers, of ``z``, of what costs and budgets leave and exceed; rows of costs, budgets, groups."""

    def __init__(
        self, sizes: Sequence[int], cost: Sequence[Array], held: Sequence[Array], offset: Array, room: Array
    ) -> None:
        self.functions, self.budgets, self.groups = len(offset), len(room), len(sizes)
        f, d, g = self.functions, self.budgets, self.groups
        self.widths = [c.shape[1] for c in cost]
        n = sum(self.widths)
        costs, helds = np.concatenate(cost, axis=1), np.concatenate(held, axis=1)
        self.cost_unit = max(float(np.abs(costs).max()), 1e-300)
        self.held_unit = np.maximum(np.maximum(np.abs(room), np.abs(helds).max(axis=1)), 1e-300)
        rows = f + d + g
        self.matrix = np.zeros((rows, n + 1 + f + 2 * d))
        self.matrix[:f, :n] = costs / self.cost_unit
        self.matrix[f : f + d, :n] = helds / self.held_unit[:, None]
        ends = np.cumsum([0, *self.widths])
        for group in range(g):
            self.matrix[f + d + group, ends[group] : ends[group + 1]] = 1.0
        self.z, left, spare, self.excess = n, n + 1, n + 1 + f, n + 1 + f + d
        self.matrix[:f, n] = -1.0
        diagonal = np.arange(f + d)
        self.matrix[diagonal, left + diagonal] = 1.0
        self.matrix[f + np.arange(d), self.excess + np.arange(d)] = -1.0
        self.right = np.concatenate([-offset / self.cost_unit, room / self.held_unit, sizes])
        self.objective = np.zeros(self.matrix.shape[1])
        self.objective[n] = 1.0
        # Every group begins under one strategy, its cheapest, whatever it holds.
        total = self.matrix[:f, :n].sum(axis=0)
        first = [int(a + np.argmin(total[a:b])) for a, b in itertools.pairwise(ends)]
        taken = self.matrix[: f + d, first] @ np.asarray(sizes, dtype=float)
        lead = int(np.argmax(taken[:f] - self.right[:f]))
        over = taken[f:] > self.right[f : f + d]
        self.basis = np.array(
            [
                *(self.z if i == lead else left + i for i in range(f)),
                *((self.excess if over[i] else spare) + i for i in range(d)),
                *first,
            ]
        )
        self.inverse = np.linalg.inv(self.matrix[:, self.basis])
        self.value = self.inverse @ self.right

    def solve(self) -> bool:
        """Pivots to the optimum; whether budgets can be kept at all."""
        for penalty in _PENALTIES:
            self.objective[self.excess :] = penalty
            self._pivot()
            exceeded = self.value[self.basis >= self.excess]
            if not len(exceeded) or exceeded.max() <= _EXCEEDED:
                return True
        return False

    def _pivot(self) -> None:
        matrix, objective, free = self.matrix, self.objective, self.z
        for _ in range(_MOST_PIVOTS):
            dual = objective[self.basis] @ self.inverse
            reduced = objective - dual @ matrix
            entering = int(reduced.argmin())
            if reduced[entering] >= -_OPTIMAL * max(1.0, objective[entering]):
                return
            column = self.inverse @ matrix[:, entering]
            shrinks = (column > _SMALLEST_PIVOT) & (self.basis != free)
            if not shrinks.any():
                return
            ratio = np.where(shrinks, np.maximum(self.value, 0.0) / np.where(shrinks, column, 1.0), np.inf)
            leaving = int(ratio.argmin())
            step = float(ratio[leaving])
            self.value -= step * column
            self.value[leaving] = step
            self.basis[leaving] = entering
            row = self.inverse[leaving] / column[leaving]
            self.inverse -= column[:, None] * row
            self.inverse[leaving] = row

    def duals(self) -> tuple[Array, Array]:
        """Weights of the costs and prices of the budgets, in their own units."""
        dual = self.objective[self.basis] @ self.inverse
        weights = np.maximum(-dual[: self.functions], 0.0)
        total = float(weights.sum())
        weights = weights / total if total > 0.0 else np.full(self.functions, 1.0 / self.functions)
        prices = np.maximum(-dual[self.functions : self.functions + self.budgets], 0.0)
        return weights, prices * self.cost_unit / self.held_unit

    def shares(self) -> list[Array]:
        """Layers per group and strategy."""
        whole = np.zeros(self.matrix.shape[1])
        whole[self.basis] = np.maximum(self.value, 0.0)
        ends = np.cumsum(self.widths)
        return np.split(whole[: ends[-1]], ends[:-1])
