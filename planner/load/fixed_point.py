"""The steady state of iteration-level batching, for any number of pools at once: a bound and a balance, no distribution.

A sweep over the requests that end in an iteration is explicit (:mod:`planner.load.balance`) and one call of the price; a
given rate is interpolated in it. The bound is its end: all slots taken, or all of the token budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.load.balance import Balance
from planner.load.iteration_time import Array, Price
from planner.load.requests import Lengths
from planner.load.scheduler import Scheduler

__all__ = ["Load", "highest_load", "steady_load"]

_SHARES = np.concatenate([np.geomspace(1e-4, 0.2, 10), np.linspace(0.25, 1.0, 22)])
"""Of the bound: the points of a sweep."""
_HALVINGS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """A pool under a steady load; arrays over rows.

    Attributes:
        rate_per_s: requests served per second; the bound where more come.
        most_per_s: the bound.
        decodes: requests that decode at a time, on average.
        tpot_s: mean seconds per output token after the first.
        ttft_s: mean seconds to the first token; infinite at or beyond the bound.
        binding: what the bound is due to: ``requests`` (slots) or ``tokens`` (the budget of an iteration).
    """

    rate_per_s: Array
    most_per_s: Array
    decodes: Array
    tpot_s: Array
    ttft_s: Array
    binding: Array


def steady_load(
    price: Price,
    rules: Scheduler,
    lengths: Lengths,
    rate_per_s: Any,
    *,
    max_requests: Any = None,
    token_budget: Any = None,
) -> Load:
    """Pools at given rates of Poisson arrivals.

    Args:
        price: called with (rows, points) arrays: a price of many pools holds its parameters as (rows, 1) columns.
        lengths: numbers, or (rows, 1) columns.
        rate_per_s: a number or (rows,).
        max_requests, token_budget: instead of the policy's; numbers or (rows,).

    >>> from planner.load.iteration_time import Affine
    >>> from planner.load.scheduler import scheduler
    >>> pool = Affine(12e-3, 60e-6, 0.0, 90e-6)  # simulated: 20.7 ms
    >>> load = steady_load(pool, scheduler("sarathi", 4096, 8192), Lengths(1000, 200), 4.0)
    >>> load.tpot_s.round(4).tolist()
    [0.0206]
    """
    balance = Balance.of(price, rules, lengths, _column(max_requests), _column(token_budget))
    return _Sweep.of(balance).at(_column(rate_per_s))


def highest_load(
    price: Price,
    rules: Scheduler,
    lengths: Lengths,
    *,
    ttft_s: float = np.inf,
    tpot_s: float = np.inf,
    max_requests: Any = None,
    token_budget: Any = None,
) -> Load:
    """Pools at the highest rate at which the *mean* latencies keep the limits; a rate of 0 where none does.

    Arguments are those of :func:`steady_load`.

    >>> from planner.load.iteration_time import Affine
    >>> from planner.load.scheduler import scheduler
    >>> pool = Affine(12e-3, 60e-6, 0.0, 90e-6)
    >>> load = highest_load(pool, scheduler("sarathi", 4096, 8192), Lengths(1000, 200), tpot_s=0.0207)
    >>> load.rate_per_s.round(1).tolist()
    [4.0]
    """
    balance = Balance.of(price, rules, lengths, _column(max_requests), _column(token_budget))
    sweep = _Sweep.of(balance)

    def kept(x: Array, theta_s: Array, rates: Array) -> Array:
        found_tpot_s, found_ttft_s, _ = sweep.latencies(x, theta_s, rates)
        return np.asarray((found_tpot_s <= tpot_s) & (found_ttft_s <= ttft_s))

    good = np.logical_and.accumulate(kept(sweep.x, sweep.theta_s, sweep.rates), axis=-1)
    last = np.maximum(np.sum(good, axis=-1, keepdims=True) - 1, 0)
    low = np.take_along_axis(sweep.rates, last, axis=-1)
    high = np.take_along_axis(sweep.rates, np.minimum(last + 1, len(_SHARES) - 1), axis=-1)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        theta_s = sweep.cycle_s(middle)
        keeps = kept(middle * theta_s, theta_s, middle)
        low, high = np.where(keeps, middle, low), np.where(keeps, high, middle)
    load = sweep.at(low)
    return replace(load, rate_per_s=np.where(good[:, 0], load.rate_per_s, 0.0))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A balance over its whole range of ``x``; arrays are (rows, points), ``most`` (rows, 1)."""

    balance: Balance
    x: Array
    theta_s: Array
    rates: Array
    most: Array
    by_slots: Array

    @classmethod
    def of(cls, balance: Balance) -> _Sweep:
        bound, by_slots = (np.atleast_2d(part) for part in balance.bound())
        x = bound * _SHARES
        theta_s = balance.seconds(x) + 0.0 * x
        rates = np.maximum.accumulate(x / theta_s, axis=-1)
        most = np.maximum(rates[:, -1:], bound / balance.full_s(bound))
        return cls(balance, x, theta_s, rates, most, by_slots + 0.0 * most > 0.0)

    def at(self, rate_per_s: Array) -> Load:
        """The load at (rows, 1) rates, up to the bound."""
        served = np.minimum(rate_per_s, self.most)
        theta_s = self.cycle_s(served)
        x = served * theta_s
        tpot_s, ttft_s, decodes = self.latencies(x, theta_s, served)
        ttft_s = np.where(rate_per_s < self.most, ttft_s, np.inf)
        binding = np.where(self.by_slots, "requests", "tokens")
        parts = np.broadcast_arrays(served, self.most, decodes, tpot_s, ttft_s, binding)
        return Load(*(part[:, 0] for part in parts))

    def cycle_s(self, rate_per_s: Array) -> Array:
        """``θ`` at (rows, 1) rates; of an affine price 1/θ is linear in the rate."""
        return 1.0 / _interpolate(self.rates, 1.0 / self.theta_s, rate_per_s)

    def latencies(self, x: Array, theta_s: Array, rate_per_s: Array) -> tuple[Array, Array, Array]:
        """Mean seconds per token and to the first, and decodes."""
        first_s, extra_s = self.balance.latencies_s(x, theta_s)
        tpot_s = theta_s + extra_s / np.maximum(self.balance.decodes, 1.0)
        ttft_s = first_s + self.balance.slot_wait_s(theta_s, self.most, rate_per_s)
        return tpot_s, ttft_s, rate_per_s * tpot_s * self.balance.decodes


def _column(values: Any) -> Any:
    """(rows,) as (rows, 1); None stays."""
    return None if values is None else np.atleast_1d(np.asarray(values, dtype=float))[:, None]


def _interpolate(at: Array, values: Array, wanted: Array) -> Array:
    """Row by row, linear in ``at`` (rows, points), at ``wanted`` (rows, 1); the nearest end outside."""
    rows = np.broadcast_shapes(at.shape[:1], wanted.shape[:1])[0]
    at, values = (np.broadcast_to(part, (rows, part.shape[1])) for part in (at, values))
    wanted = np.broadcast_to(wanted, (rows, 1))
    right = np.clip(np.sum(at < wanted, axis=-1, keepdims=True), 1, at.shape[-1] - 1)
    x0, x1 = (np.take_along_axis(at, i, axis=-1) for i in (right - 1, right))
    y0, y1 = (np.take_along_axis(values, i, axis=-1) for i in (right - 1, right))
    part = np.clip((wanted - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0.0, 1.0)
    return np.asarray(y0 + part * (y1 - y0))
