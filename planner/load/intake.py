"""What all batches of a replica share: its requests and how far they are, one queue, and one pool of KV blocks."""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappush
from math import inf

import numpy as np

from planner.load.requests import Requests
from planner.load.scheduler import KvPool

__all__ = ["Intake"]


class Intake:
    """Requests on their way through a replica.

    Args:
        by_priority: whether the lowest priority number waits in front, instead of the first to come.
        concurrency: a closed loop of so many clients, which makes the arrivals itself.
    """

    def __init__(self, requests: Requests, pool: KvPool, by_priority: bool, concurrency: int | None) -> None:
        count = len(requests)
        self.requests, self.pool = requests, pool
        self.arrival: list[float] = requests.arrival_s.tolist()
        self.prompt: list[int] = requests.prompt_tokens.tolist()
        self.output: list[int] = requests.output_tokens.tolist()
        self.cached: list[int] = requests.cached_tokens.tolist()
        urgency = requests.priority if by_priority else np.zeros(count, dtype=np.int64)
        self.priority: list[int] = urgency.tolist()
        self.first = [-1.0] * count
        self.finish = [0.0] * count
        self.gave_way = [0] * count
        self.made = [0] * count  # output tokens so far
        self.computed = list(self.cached)  # tokens of the prompt (and of what is made again) in the KV cache
        self.held = [0] * count  # blocks
        self.swapped: set[int] = set()
        self.closed = concurrency is not None
        self.coming = min(concurrency, count) if concurrency is not None else 0
        if concurrency is not None:
            self.arrival = [0.0] * self.coming + [inf] * (count - self.coming)
        self.arrived = self.done = 0
        self.waiting: list[tuple[int, int]] = []  # a heap of (priority, request)
        self.prefilling: list[int] = []
        self.running = 0  # requests that were admitted, of all batches
        self.free = pool.blocks

    def take_arrivals(self, now_s: float) -> None:
        """Puts into the queue what has come."""
        last = len(self.arrival)
        while self.arrived < last and self.arrival[self.arrived] <= now_s:
            heappush(self.waiting, (self.priority[self.arrived], self.arrived))
            self.arrived += 1

    def end(self, request: int, now_s: float) -> None:
        """A request is done; in a closed loop its client sends the next one."""
        self.free += self.held[request]
        self.held[request] = 0
        self.finish[request] = now_s
        self.done += 1
        self.running -= 1
        if self.closed and self.coming < len(self.arrival):
            # Batches under way may end before one that was taken up earlier: arrivals stay in order.
            place = bisect_right(self.arrival, now_s, self.arrived, self.coming)
            self.arrival[place + 1 : self.coming + 1] = self.arrival[place : self.coming]
            self.arrival[place] = now_s
            self.coming += 1
