"""The steady state of iteration-level batching, for any number of pools at once: a bound and a balance, no distribution.

Let ``x`` requests end in an iteration. Then ``x`` begin, an iteration computes ``m = xP`` prompt tokens, and by Little's law
``n = xD`` requests decode, ``D`` iterations each; a decode itself sees one more (it is among them). So a composition follows
from ``x`` alone, its time ``θ`` from the price, and the rate is ``λ = x/θ``: a sweep over ``x`` is explicit and one call of the
price; a given rate is interpolated in it. The bound is the largest ``x``: of the slots, or of the token budget.

Iterations without prompts and with several are not alike where the price is not affine: a share ``1 − exp(−xk)`` of them holds
prompts, of ``k`` chunks each. Under "prompts first" a decode iteration is followed by ``κ`` prefill iterations instead, fewer
than ``x`` where prompts that wait together run together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.costs.queueing import ggc_wait_s
from planner.load.iteration_time import Array, Price
from planner.load.requests import Lengths
from planner.load.scheduler import Scheduler

__all__ = ["Balance", "Load", "highest_load", "steady_load"]

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


@dataclass(frozen=True, slots=True)
class Balance:
    """The composition of iterations as a function of ``x``; every field broadcasts with it.

    Attributes:
        price: of an iteration.
        rules: mixed, chunked; its limits are replaced by the next two.
        max_requests, token_budget: limits, one per row.
        lengths: of the requests.
    """

    price: Price
    rules: Scheduler
    max_requests: Array
    token_budget: Array
    lengths: Lengths

    @classmethod
    def of(
        cls,
        price: Price,
        rules: Scheduler,
        lengths: Lengths,
        max_requests: Any = None,
        token_budget: Any = None,
    ) -> Balance:
        """The balance with the policy's own limits unless others are given."""
        slots = rules.max_requests if max_requests is None else max_requests
        budget = rules.token_budget if token_budget is None else token_budget
        return cls(price, rules, np.asarray(slots, dtype=float), np.asarray(budget, dtype=float), lengths)

    @property
    def decodes(self) -> Array:
        """``D``: iterations that a request decodes in."""
        return np.asarray(np.maximum(self.lengths.decodes, 1e-3))

    def room(self, n: Array) -> Array:
        """Prompt tokens that fit into an iteration beside ``n`` decodes."""
        return np.maximum(self.token_budget - (n if self.rules.mixed else 0.0), 1.0)

    def together(self, room: Array) -> Array:
        """Whole prompts of a full iteration, one at least: the next one does not fit, and leaves half of one unused.

        Exact on average for fixed lengths; within 15 % for gamma lengths of squared variation up to 4.
        """
        return np.asarray(np.maximum(room / self.lengths.computed_tokens - 0.5, 1.0))

    def chunks(self, room: Array) -> Array:
        """``k``: iterations that compute a prompt which is alone."""
        parts = self.lengths.computed_tokens / room
        return np.where(parts > 0.5, parts + 0.5, 1.0) if self.rules.chunked else np.ones_like(parts)

    def bound(self) -> tuple[Array, Array]:
        """The largest ``x`` and whether slots (not tokens) are what it is due to."""
        d, p = self.decodes, self.lengths.computed_tokens
        if not self.rules.mixed:
            slots = self.max_requests / d + 0.0 * p
            return slots, np.ones_like(slots, dtype=bool)
        slots = self.max_requests / (d + self.chunks(self.room(self.max_requests)))
        tokens = self.token_budget / (d + p)
        return np.minimum(slots, tokens), slots <= tokens

    def seconds(self, x: Array) -> Array:
        """``θ``: seconds from one decode iteration to the next."""
        return self.cycle_s(np.minimum(x * self.decodes + 1.0, self.max_requests), x)

    def cycle_s(self, n: Array, x: Array) -> Array:
        """``θ`` with ``n`` decodes while ``x`` requests begin from one decode iteration to the next."""
        alone_s = self.decode_s(n)
        if not self.rules.mixed:
            return alone_s + self._prefill_first_s(x, alone_s)
        room = self.room(n)
        tokens = x * self.lengths.computed_tokens
        share = np.clip(np.maximum(-np.expm1(-x * self.chunks(room)), tokens / room), 1e-12, 1.0)
        mixed_s = self.prefill_s(n, np.minimum(tokens / share, room))
        return np.asarray(alone_s + share * (mixed_s - alone_s))

    def decode_s(self, n: Array) -> Array:
        """An iteration of ``n`` decodes."""
        return self.price(n, n * self.lengths.context_tokens, np.zeros_like(n), np.zeros_like(n))

    def prefill_s(self, n: Array, tokens: Array) -> Array:
        """An iteration of ``n`` decodes and so many prompt tokens."""
        per_token = self.lengths.prefill_context_tokens / self.lengths.computed_tokens
        return self.price(n, n * self.lengths.context_tokens, tokens, tokens * per_token)

    def full_s(self, x: Array) -> Array:
        """``θ`` where all slots are always taken: the next prefill fills those that came free, and no other prompt runs."""
        if self.rules.mixed:
            return self.seconds(x)
        alone_s, single_s, per_prompt_s, most = self._prefill_costs(self.max_requests + 0.0 * x)
        batches = np.clip(-np.expm1(-x), x / most, x)
        return np.asarray(alone_s + batches * single_s + (x - batches) * per_prompt_s)

    def _prefill_costs(self, n: Array) -> tuple[Array, Array, Array, Array]:
        """Seconds of a decode iteration, of one prompt alone, of one more beside others, and how many run together."""
        none, one = np.zeros_like(n), self.lengths.computed_tokens + np.zeros_like(n)
        most = self.together(self.room(none))
        single_s, several_s = self.prefill_s(none, one), self.prefill_s(none, most * one)
        per_prompt_s = np.where(most > 1.0, (several_s - single_s) / np.maximum(most - 1.0, 1e-9), single_s)
        return self.decode_s(n), single_s, per_prompt_s, most

    def _prefill_first_s(self, x: Array, decode_s: Array) -> Array:
        """Prefill seconds per decode iteration: ``κ`` batches, from one prompt each to as many as fit.

        There are prompts after a decode iteration with ``1 − exp(−λ·decode)``, after a prefill with ``1 − exp(−λ·prefill)``.
        """
        _, single_s, per_prompt_s, most = self._prefill_costs(np.zeros_like(x))
        batches, seconds = x, x * single_s
        for _ in range(8):
            rate = x / (decode_s + seconds)
            batch_s = single_s + per_prompt_s * (x / batches - 1.0)
            several = -np.expm1(-rate * decode_s) * np.exp(np.minimum(rate * batch_s, 30.0))
            batches = np.clip(0.5 * (batches + several), x / most, x)
            seconds = batches * single_s + (x - batches) * per_prompt_s
        return seconds

    # -- latencies -------------------------------------------------------------------------------------------------------

    def first_token_s(self, x: Array, theta_s: Array) -> tuple[Array, Array]:
        """Mean seconds to the first token without waiting for a slot, and by how much a decode then exceeds its cycles.

        An arrival waits for the rest of an iteration, behind what exceeds the budget as in M/G/1, and for its own iterations.
        While it did, others came: it decodes beside the prefills of more prompts than come in a cycle.
        """
        rate = x / theta_s
        n = np.minimum(x * self.decodes + 1.0, self.max_requests)
        busy = -np.expm1(-x * self.decodes)
        wait_s, own_s, load, stay_s = (
            self._mixed_wait(x, n, theta_s, busy)
            if self.rules.mixed
            else self._prefill_wait(x, n, theta_s, busy)
        )
        extra_s = (
            load * (stay_s - theta_s * (1.0 if self.rules.mixed else 0.0)) / np.maximum(1.0 - load, 0.02)
        )
        return wait_s + own_s + 0.0 * rate, extra_s

    def _mixed_wait(
        self, x: Array, n: Array, theta_s: Array, busy: Array
    ) -> tuple[Array, Array, Array, Array]:
        p, cv2, rate = self.lengths.computed_tokens, np.asarray(self.lengths.prompt_cv2), x / theta_s
        room = self.room(n) if self.rules.chunked else np.maximum(self.together(self.room(n)) * p, p)
        decode_s = self.decode_s(n)
        one_s = self.prefill_s(n, np.minimum(p, room) + 0.0 * x)
        full_s = self.prefill_s(n, np.minimum(room, 50.0 * p) + 0.0 * x)
        work_s = np.maximum(p * (full_s - decode_s) / np.minimum(room, 50.0 * p), 0.0)
        load = np.minimum(rate * work_s, 0.98)
        second_s2 = decode_s**2 + 2.0 * decode_s * load * theta_s + work_s * load * theta_s * (1.0 + cv2)
        rest_s = busy * 0.5 * second_s2 / np.maximum(1.0 - load**2, 0.04) / theta_s * (1.0 + 2.0 * load)
        crowd = np.minimum(x * p / room, 0.98)
        turn_s = full_s * p / np.minimum(room, 50.0 * p)
        behind_s = np.where(room < 50.0 * p, 0.5 * crowd * turn_s * (1.0 + cv2) / (1.0 - crowd), 0.0)
        own_s = np.where(p > room, np.maximum(p / room, 1.0) * full_s, one_s)
        return rest_s + behind_s, own_s, load, one_s + 0.0 * x

    def _prefill_wait(
        self, x: Array, n: Array, theta_s: Array, busy: Array
    ) -> tuple[Array, Array, Array, Array]:
        cv2, rate = np.asarray(self.lengths.prompt_cv2), x / theta_s
        decode_s, single_s, per_prompt_s, most = self._prefill_costs(n)
        share = np.clip(1.0 - decode_s / theta_s, 0.0, 0.98)
        batch = np.clip(
            x * (single_s - per_prompt_s) / np.maximum(theta_s - decode_s - x * per_prompt_s, 1e-12),
            1e-12,
            None,
        )
        batch = np.clip(np.where(single_s > per_prompt_s, batch, 1.0), 1.0, most)
        batch_s = single_s + per_prompt_s * (batch - 1.0)
        crowd = np.minimum(rate * (single_s + per_prompt_s * (most - 1.0)) / most, 0.98)
        rest_s = 0.5 * (share * batch_s * (1.0 + cv2 / batch) + (1.0 - share) * busy * decode_s)
        wait_s = rest_s / (1.0 - crowd)
        return wait_s, batch_s, crowd, batch_s + wait_s / most

    def slot_wait_s(self, theta_s: Array, most_per_s: Array, rate_per_s: Array) -> Array:
        """Mean wait for a slot: that of M/G/c, with as many servers as spread ``n`` as wide.

        Where iterations get longer with ``n``, its variance is ``θ(n)/θ(1)`` times that of independent servers.
        """
        served = np.minimum(rate_per_s, most_per_s * (1.0 - 1e-9))
        alone_s = self.decode_s(np.ones_like(theta_s))
        servers = np.maximum(np.rint(self.max_requests * np.minimum(alone_s / theta_s, 1.0)), 1.0)
        cv2 = np.asarray(self.lengths.output_cv2)
        return np.asarray(ggc_wait_s(served, servers / most_per_s, servers, 1.0, cv2))


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
        first_s, extra_s = self.balance.first_token_s(x, theta_s)
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
