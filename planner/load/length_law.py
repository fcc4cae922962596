"""A gamma law of lengths as numbers: on a grid of cells, and as a few nodes with weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.load.iteration_time import Array

__all__ = ["LengthLaw"]

_POINTS = 2048
_FIXED = 1e-4
"""Squared variation below which lengths are taken as fixed."""

# Cumulative probabilities between the nodes: fine in the tail, from which 99th percentiles come.
_EDGES = np.concatenate([np.linspace(0.0, 0.9, 13), 1.0 - np.geomspace(0.1, 5e-4, 13)[1:], [1.0]])


@dataclass(frozen=True, slots=True)
class LengthLaw:
    """Gamma of ``mean`` and squared variation ``cv2``, at its points: the probability and the part of the mean below each."""

    mean: float
    cv2: float
    points: Array
    below: Array
    mean_below: Array

    @classmethod
    def of(cls, mean: float, cv2: float) -> LengthLaw:
        """Integrates the density by trapezoids, over ``x^k`` where the shape ``k`` is below 1 (it has a pole at 0)."""
        if cv2 < _FIXED:
            return cls(mean, 0.0, np.array([mean]), np.array([1.0]), np.array([mean]))
        shape = 1.0 / cv2
        power = min(shape, 1.0)
        first = max(shape - 12.0 * np.sqrt(shape), 0.0)
        u = np.linspace(first**power, (shape + 12.0 * np.sqrt(shape) + 16.0) ** power, _POINTS)
        x = u ** (1.0 / power)
        exponent = (shape - power) * np.log(np.maximum(x, 1e-300)) - x
        density = np.exp(exponent - np.max(exponent))
        below = _running_integral(u, density)
        mean_below = _running_integral(u, density * x)
        return cls(
            mean,
            cv2,
            x * mean * below[-1] / mean_below[-1],
            below / below[-1],
            mean * mean_below / mean_below[-1],
        )

    def on_grid(self, step: float, cells: int) -> Array:
        """(cells,) probabilities of ``0, step, 2·step …``; a length between two is split so that the mean stays.

        >>> LengthLaw.of(2.5, 0.0).on_grid(1.0, 5).tolist()
        [0.0, 0.0, 0.5, 0.5, 0.0]
        """
        edges = step * np.arange(cells + 1)
        if not self.cv2:
            chance: Array = np.maximum(1.0 - np.abs(edges[:-1] - self.mean) / step, 0.0)
            chance[-1] += 1.0 - np.sum(chance)
            return chance
        inside = np.diff(np.interp(edges, self.points, self.below))
        mass = np.diff(np.interp(edges, self.points, self.mean_below))
        upper = np.clip((mass - edges[:-1] * inside) / step, 0.0, inside)
        chance = inside - upper
        chance[1:] += upper[:-1]
        chance[-1] += 1.0 - np.sum(chance)
        return chance

    def nodes(self) -> tuple[Array, Array]:
        """Means of slices of the law, and their probabilities.

        >>> values, chances = LengthLaw.of(100.0, 2.0).nodes()
        >>> round(float(values @ chances), 6)
        100.0
        """
        if not self.cv2:
            return np.array([self.mean]), np.array([1.0])
        parts = np.interp(_EDGES, self.below, self.mean_below)
        chances = np.diff(_EDGES)
        return np.diff(parts) / chances, chances

    def shared_fraction(self) -> float:
        """``∫F̄²/∫F̄``: of a length, how much a second one that starts with it covers on average.

        >>> round(LengthLaw.of(10.0, 1.0).shared_fraction(), 3)
        0.5
        """
        if not self.cv2:
            return 1.0
        above = 1.0 - self.below
        gaps = np.diff(self.points, prepend=0.0)
        middle = 0.5 * (above + np.concatenate([[1.0], above[:-1]]))
        return float(np.sum(middle**2 * gaps) / np.sum(middle * gaps))


def _running_integral(x: Array, y: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(0.5 * (y[1:] + y[:-1]) * np.diff(x))])
