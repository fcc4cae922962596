"""What arrivals of their own add to a steady state: the wait for a slot, in closed form for all rows of a search at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.costs.queueing import many_servers_wait
from planner.ledger import Array
from planner.serving.aggregated import Steady
from planner.specs.traffic import Traffic

__all__ = ["MOST_LOAD", "Arrivals"]

MOST_LOAD = 0.95
"""Of what a replica's slots can carry where no limit keeps it lower: beyond it the wait has no steady state to speak of."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """Replicas whose slots are all taken, and one request alone: what a wait for a slot is measured by; arrays over rows.

    Attributes:
        traffic: requests.
        slots: requests that a replica holds at once.
        full: the steady state with all slots taken.
        alone_s: an iteration of one sequence.
        clients: of a replica, where they replace every answer at once.
    """

    traffic: Traffic
    slots: Array
    full: Steady
    alone_s: Array
    clients: Array

    def take(self, index: Array) -> Arrivals:
        """Some rows."""
        columns = {name: getattr(self, name)[index] for name in ("slots", "alone_s", "clients")}
        return replace(self, full=self.full.take(index), **columns)

    def meet(self, state: Steady) -> Steady:
        """The state with the wait for a slot in it; clients that replace every answer wait where there are more than slots.

        Requests hold slots longer the more of them there are, which spreads their number as fewer servers would
        (:meth:`planner.load.balance.Balance.slot_wait_s`).
        """
        if self.traffic.concurrency is not None:
            outside_s = np.maximum(self.clients - self.slots, 0.0) / state.requests_per_s
            return replace(state, ttft_s=state.ttft_s + outside_s)
        full, steps = self.full, self.traffic.osl - 1.0
        rate = np.minimum(state.requests_per_s, MOST_LOAD * full.requests_per_s)
        # What slots would carry if no prompt waited in one: more than comes through where the budget of tokens binds.
        pace_s = np.minimum((steps * full.tpot_s + full.prefill_s) / self.slots, 1.0 / full.requests_per_s)
        # Answers of one token have no time between tokens, and nothing slows them.
        share = np.divide(
            self.alone_s, state.tpot_s, out=np.ones_like(state.tpot_s), where=state.tpot_s > 0.0
        )
        servers = np.maximum(self.slots * np.minimum(share, 1.0), 1.0)
        waits, wait_s = many_servers_wait(rate * pace_s, servers, pace_s, self.traffic.length_scv)
        return replace(
            state,
            requests_per_s=rate,
            ttft_s=state.ttft_s + wait_s,
            slot_wait_s=np.asarray(wait_s),
            slot_waits=np.asarray(waits),
        )
