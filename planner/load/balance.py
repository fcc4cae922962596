"""What an iteration holds when as many requests end as begin, and the latencies that follow from it.

Let ``x`` requests end in an iteration. Then ``x`` begin, an iteration computes ``m = xP`` prompt tokens, and by Little's law
``n = xD`` requests decode, ``D`` iterations each; a decode itself sees one more (it is among them). So a composition follows
from ``x`` alone, its time ``θ`` from the price, and the rate is ``λ = x/θ``.

Iterations without prompts and with several are not alike where the price is not affine: a share ``1 − exp(−xk)`` of them holds
prompts, of ``k`` chunks each. Under "prompts first" a decode iteration is followed by ``κ`` prefill iterations instead, fewer
than ``x`` where prompts that wait together run together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.costs.queueing import ggc_wait_s
from planner.load.iteration_time import Array, Price
from planner.load.requests import Lengths
from planner.load.scheduler import Scheduler

__all__ = ["Balance"]

_MANY = 50.0
"""Prompts in an iteration that stand for any number of them."""
_HEAVIEST = 0.98
"""Load at which means are cut off: beyond it they are those of no steady state that matters."""


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

    def latencies_s(self, x: Array, theta_s: Array) -> tuple[Array, Array]:
        """Mean seconds to the first token where slots are free, and by how much a request then decodes longer than its cycles.

        An arrival waits for the rest of an iteration, behind what exceeds the budget, and for its own iterations. While it
        did, others came whose prefills it meets, more of them than come in a cycle.
        """
        n = np.minimum(x * self.decodes + 1.0, self.max_requests)
        busy = -np.expm1(-x * self.decodes)  # the chance that anything decodes, if n is Poisson
        if self.rules.mixed:
            return self._mixed_latencies_s(x, n, theta_s, busy)
        return self._prefill_first_latencies_s(x, n, theta_s, busy)

    def _mixed_latencies_s(self, x: Array, n: Array, theta_s: Array, busy: Array) -> tuple[Array, Array]:
        """Each iteration takes what came in the one before: with ``s = t0 + αk`` for ``k`` prompts the moments of ``s`` follow.

        ``E[s²](1 − (λα)²) = t0² + 2t0λα·θ + αλα·θ(1 + cv²)``, and an arrival waits ``E[s²]/(2θ)``, twice ``λα`` times that for
        those who came with it. What exceeds the budget waits as in M/G/1, at the speed of full iterations.
        """
        p, cv2, rate = self.lengths.computed_tokens, np.asarray(self.lengths.prompt_cv2), x / theta_s
        room = self.room(n) if self.rules.chunked else np.maximum(self.together(self.room(n)) * p, p)
        many = np.minimum(room, _MANY * p)  # a budget without bounds is priced at many prompts
        decode_s, full_s = self.decode_s(n), self.prefill_s(n, many + 0.0 * x)
        one_s = self.prefill_s(n, np.minimum(p, room) + 0.0 * x)
        work_s = np.maximum(p * (full_s - decode_s) / many, 0.0)
        load = np.minimum(rate * work_s, _HEAVIEST)
        square_s2 = decode_s**2 + load * theta_s * (2.0 * decode_s + work_s * (1.0 + cv2))
        rest_s = busy * 0.5 * square_s2 / ((1.0 - load**2) * theta_s) * (1.0 + 2.0 * load)
        crowd = np.minimum(x * p / room, _HEAVIEST)
        queue_s = 0.5 * crowd * full_s * p / many * (1.0 + cv2) / (1.0 - crowd)
        own_s = np.where(p > room, np.maximum(p / room, 1.0) * full_s, one_s)
        wait_s = rest_s + np.where(room < _MANY * p, queue_s, 0.0)
        return wait_s + own_s, load * np.maximum(one_s - theta_s, 0.0) / (1.0 - load)

    def _prefill_first_latencies_s(
        self, x: Array, n: Array, theta_s: Array, busy: Array
    ) -> tuple[Array, Array]:
        """The rest of a batch of prompts or of a decode iteration, behind what exceeds a batch as in M/G/1; then the own batch.

        Decodes begin when no prompt waits: after those that came during the own batch, and those behind in a full one.
        """
        cv2, rate = np.asarray(self.lengths.prompt_cv2), x / theta_s
        decode_s, single_s, per_prompt_s, most = self._prefill_costs(n)
        share = np.clip(1.0 - decode_s / theta_s, 0.0, _HEAVIEST)
        # θ = decode + κ·single + (x − κ)·per prompt gives the batches κ, and x/κ prompts in each.
        starts_s = np.maximum(theta_s - decode_s - x * per_prompt_s, 1e-12)
        saved_s = single_s - per_prompt_s
        batch = np.clip(np.where(saved_s > 0.0, x * saved_s / starts_s, 1.0), 1.0, most)
        batch_s = single_s + per_prompt_s * (batch - 1.0)
        crowd = np.minimum(rate * (single_s + per_prompt_s * (most - 1.0)) / most, _HEAVIEST)
        rest_s = 0.5 * (share * batch_s * (1.0 + cv2 / batch) + (1.0 - share) * busy * decode_s)
        wait_s = rest_s / (1.0 - crowd)
        return wait_s + batch_s, crowd * (batch_s + wait_s / most) / (1.0 - crowd)

    def work_cv2(self, slots: Array, full_per_s: Array) -> Array:
        """Squared variation of what requests keep full slots busy with: ``u²·c_O² + (1 − u)²·c_P²``.

        While ``c`` slots are full, requests go through at the pace of their decodes, ``Dθ_0/c`` each (iterations without
        prompts), and of their prompts, which hold up all slots at once: ``u`` is the decodes' share of both.
        """
        own = np.clip(self.decodes * self.decode_s(slots) / slots * full_per_s, 0.0, 1.0)
        lengths = self.lengths
        return np.asarray(own**2 * lengths.output_cv2 + (1.0 - own) ** 2 * lengths.prompt_cv2)

    def slot_wait_s(self, theta_s: Array, most_per_s: Array, rate_per_s: Array) -> Array:
        """Mean wait for a slot: that of M/G/c, with as many servers as spread ``n`` as wide.

        Where iterations get longer with ``n``, its variance is ``θ(n)/θ(1)`` times that of independent servers.
        """
        served = np.minimum(rate_per_s, most_per_s * (1.0 - 1e-9))
        alone_s = self.decode_s(np.ones_like(theta_s))
        servers = np.maximum(np.rint(self.max_requests * np.minimum(alone_s / theta_s, 1.0)), 1.0)
        cv2 = self.work_cv2(self.max_requests + 0.0 * theta_s, most_per_s)
        return np.asarray(ggc_wait_s(served, servers / most_per_s, servers, 1.0, cv2))
