"""The state of a serving engine between two iterations, and what changes it: admissions, iterations, ends and preemptions."""

from __future__ import annotations

from heapq import heappop, heappush
from math import ceil, inf, sqrt

import numpy as np

from planner.load.iteration_time import IterationTime
from planner.load.requests import Requests
from planner.load.scheduler import KvPool, Scheduler

__all__ = ["Engine"]

_FOREVER = 2**62


class Engine:
    """The state of a pool between two iterations, and what changes it.

    A decode that joined after ``D0`` decode iterations ends after ``D0 + its tokens``: the running batch is a heap of ends,
    and its context ``Σ(tokens held − D0)`` plus ``n`` times the count of iterations.
    """

    def __init__(
        self,
        requests: Requests,
        iteration: IterationTime,
        scheduler: Scheduler,
        pool: KvPool,
        concurrency: int | None,
    ) -> None:
        count = len(requests)
        self.requests, self.iteration, self.rules, self.pool = requests, iteration, scheduler, pool
        self.arrival: list[float] = requests.arrival_s.tolist()
        self.prompt: list[int] = requests.prompt_tokens.tolist()
        self.output: list[int] = requests.output_tokens.tolist()
        self.cached: list[int] = requests.cached_tokens.tolist()
        urgency = requests.priority if scheduler.order == "priority" else np.zeros(count, dtype=np.int64)
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
        self.arrived = 0
        if concurrency is not None:
            self.arrival = [0.0] * self.coming + [inf] * (count - self.coming)
        self.now_s = self.busy_s = 0.0
        self.waiting: list[tuple[int, int]] = []  # a heap of (priority, request)
        self.prefilling: list[int] = []
        self.decoding: dict[int, int] = {}  # request -> decode iteration in which it joined
        self.ends: list[
            tuple[int, int, int]
        ] = []  # a heap of (last decode iteration, request, when it joined)
        self.steps = 0  # decode iterations so far
        self.offset = 0  # Σ over decodes of tokens attended to at the next step, minus the steps so far
        self.free = pool.blocks
        self.phase = [0] * pool.block_tokens  # decodes that enter a block, by (steps mod block)
        self.swap_s = 0.0
        self.done = self.iterations = self.request_iterations = 0
        self.log: list[tuple[float, float, int]] = []

    # -- one iteration, or a stretch of equal ones -----------------------------------------------------------------------

    def advance(self) -> None:
        """Runs up to the next moment at which the batch may change."""
        self._take_arrivals()
        if not (self.waiting or self.prefilling or self.decoding):
            self.now_s = self.arrival[self.arrived]
            self._take_arrivals()
        displaced = self.rules.mixed and self._make_room()
        chunks = self._chunks(admits=not displaced)
        if chunks:
            self._iterate(chunks, len(self.decoding) if self.rules.mixed else 0)
        else:
            displaced = self._make_room() or displaced
            self._stretch(len(self.decoding), 1 if displaced else _FOREVER)

    def _take_arrivals(self) -> None:
        last = len(self.arrival)
        while self.arrived < last and self.arrival[self.arrived] <= self.now_s:
            heappush(self.waiting, (self.priority[self.arrived], self.arrived))
            self.arrived += 1

    def _iterate(self, chunks: list[tuple[int, int]], decodes: int) -> None:
        tokens, attended = self._prefill_load(chunks)
        base_s, per_context_s, per_prefill_s = self.iteration.line(decodes, tokens)
        context = self.offset + decodes * self.steps if decodes else 0
        seconds = base_s + per_context_s * context + per_prefill_s * attended
        self._pass(seconds + self.swap_s, 1, decodes + len(chunks))
        if decodes:
            self.log.append((seconds, seconds, decodes))
            self.free -= self._growth(1)
            self.steps += 1
            self._end_decodes()
        self._end_prefills(chunks)

    def _prefill_load(self, chunks: list[tuple[int, int]]) -> tuple[int, float]:
        """Prompt tokens of the chunks and what they attend to; a gated batch is padded to its longest prompt."""
        if self.rules.gated:
            longest = max(tokens for _, tokens in chunks)
            chunks = [(request, longest) for request, _ in chunks]
        total, attended = 0, 0.0
        for request, tokens in chunks:
            total += tokens
            attended += tokens * (self.computed[request] + (tokens + 1) / 2)
        return total, attended

    def _stretch(self, decodes: int, most: int) -> None:
        """Decodes alone, up to the next end, the next arrival that matters, the last free block, or ``most`` iterations."""
        assert decodes, "an iteration holds something"
        base_s, per_context_s, _ = self.iteration.line(decodes, 0)
        first_s = base_s + per_context_s * (self.offset + decodes * self.steps)
        slope_s = per_context_s * decodes
        count = min(self.ends[0][0] - self.steps, most)
        if self._growth(count) > self.free:
            count = self._affordable()
        heeds_arrivals = not self.waiting or self.rules.order == "priority"
        if heeds_arrivals and not self.rules.gated and self.arrived < len(self.arrival):
            count = _steps_until(self.arrival[self.arrived] - self.now_s, first_s, slope_s, count)
        seconds = count * first_s + slope_s * (count * (count - 1) // 2)
        self.log.append((first_s, first_s + slope_s * (count - 1), decodes * count))
        self._pass(seconds + self.swap_s, count, decodes)
        self.free -= self._growth(count)
        self.steps += count
        self._end_decodes()

    def _pass(self, seconds: float, iterations: int, requests: int) -> None:
        self.now_s += seconds
        self.busy_s += seconds
        self.swap_s = 0.0
        self.iterations += iterations
        self.request_iterations += iterations * requests

    # -- admission ---------------------------------------------------------------------------------------------------------

    def _chunks(self, admits: bool) -> list[tuple[int, int]]:
        """What of which prompts is computed next; admits requests, and puts what was swapped out back to work."""
        rules, chunks = self.rules, []
        room = rules.token_budget - (len(self.decoding) if rules.mixed else 0)
        for request in self.prefilling:
            if room <= 0:
                break
            tokens = min(self._missing(request), room)
            chunks.append((request, tokens))
            room -= tokens
        if rules.gated and self.decoding:
            admits = False
        while admits and self.waiting and room > 0:
            request = self.waiting[0][1]
            tokens = 0 if request in self.swapped else self._missing(request)
            if not rules.chunked and tokens > room and chunks:
                break
            if not self._admit(request):
                break
            if request in self.swapped:
                self._resume(request)
                room -= 1 if rules.mixed else 0
                continue
            if rules.chunked:
                tokens = min(tokens, room)
            self.prefilling.append(request)
            chunks.append((request, tokens))
            room -= tokens
        if rules.order == "priority":  # an admission may have displaced what was cut before
            chunks = [chunk for chunk in chunks if chunk[0] in self.prefilling]
        return chunks

    def _missing(self, request: int) -> int:
        missing: int = self.prompt[request] + self.made[request] - self.computed[request]
        return missing

    def _admit(self, request: int) -> bool:
        """Takes a slot and blocks if there are any; an urgent request takes them from less urgent ones."""
        made = self.output[request] if self.rules.reserve == "whole" else self.made[request]
        blocks = self.pool.blocks_of(self.prompt[request] + made)
        margin = self.pool.watermark_blocks
        while (
            len(self.decoding) + len(self.prefilling) >= self.rules.max_requests
            or self.free - blocks - (self._growth(1) if self.rules.mixed else 0) < margin
        ):
            if self.rules.order != "priority" or not self._displace(self.priority[request]):
                return False
        heappop(self.waiting)
        if request not in self.swapped:
            self.held[request] = blocks
        self.free -= self.held[request]
        return True

    def _resume(self, request: int) -> None:
        self.swapped.remove(request)
        self.swap_s += self.held[request] * self.pool.swap_s_per_block
        self._join(request)

    # -- ends ------------------------------------------------------------------------------------------------------------

    def _end_prefills(self, chunks: list[tuple[int, int]]) -> None:
        ended = []
        for request, tokens in chunks:
            self.computed[request] += tokens
            if self._missing(request) == 0:
                ended.append(request)
        if not ended:
            return
        over = set(ended)
        self.prefilling = [request for request in self.prefilling if request not in over]
        for request in ended:
            self.made[request] += 1
            if self.first[request] < 0.0:
                self.first[request] = self.now_s
        if self.rules.gated:
            longest = max(self.output[request] for request in ended)
            for request in ended:
                self._join(request, longest - 1) if longest > 1 else self._end(request)
            return
        for request in ended:
            if self.made[request] == self.output[request]:
                self._end(request)
            else:
                self._join(request)

    def _join(self, request: int, tokens: int | None = None) -> None:
        """A request decodes from the next iteration on, for ``tokens`` iterations (as many as it lacks by default)."""
        steps = self.steps
        self.decoding[request] = steps
        remaining = self.output[request] - self.made[request] if tokens is None else tokens
        heappush(self.ends, (steps + remaining, request, steps))
        stored = self.prompt[request] + self.made[request] - 1
        self.offset += stored + 1 - steps
        self.phase[(steps - stored) % self.pool.block_tokens] += 1

    def _end_decodes(self) -> None:
        steps, ends = self.steps, self.ends
        while ends and ends[0][0] <= steps:
            _, request, joined = heappop(ends)
            if self.decoding.get(request) == joined:
                self._leave(request)
                self._end(request)
        self._forget_ends()

    def _forget_ends(self) -> None:
        """Drops the ends of requests that gave way."""
        while self.ends and self.decoding.get(self.ends[0][1]) != self.ends[0][2]:
            heappop(self.ends)

    def _leave(self, request: int) -> None:
        """Out of the decoding batch; what it has made counts."""
        joined = self.decoding.pop(request)
        stored = self.prompt[request] + self.made[request] - 1
        self.offset -= stored + 1 - joined
        self.phase[(joined - stored) % self.pool.block_tokens] -= 1
        self.made[request] += self.steps - joined
        if self.rules.reserve == "prompt":
            self.held[request] = self.pool.blocks_of(stored + self.steps - joined)

    def _end(self, request: int) -> None:
        self.free += self.held[request]
        self.held[request] = 0
        self.finish[request] = self.now_s
        self.done += 1
        if self.closed and self.coming < len(self.arrival):
            self.arrival[self.coming] = self.now_s
            self.coming += 1

    # -- memory ------------------------------------------------------------------------------------------------------------

    def _growth(self, count: int) -> int:
        """Blocks that the next ``count`` decode iterations enter."""
        if self.rules.reserve == "whole":
            return 0
        size = self.pool.block_tokens
        cycles, rest = divmod(count, size)
        start = self.steps % size
        grown = cycles * len(self.decoding) + sum(self.phase[start : start + rest])
        return grown + sum(self.phase[: start + rest - size]) if start + rest > size else grown

    def _affordable(self) -> int:
        """Decode iterations until the pool is full; one is known to fit."""
        count = max(self.free // len(self.decoding) * self.pool.block_tokens, 1)
        while self._growth(count + 1) <= self.free:
            count += 1
        return count

    def _make_room(self) -> bool:
        """Requests give way until all others can decode a token; whether any did."""
        displaced = False
        while self._growth(1) > self.free:
            displaced = self._displace(None)
            assert displaced, "every request fits alone"
        return displaced

    def _displace(self, urgency: int | None) -> bool:
        """The least urgent and latest running request gives way: any, or one of less ``urgency``."""
        running = [*self.decoding, *self.prefilling]
        if not running:
            return False
        request = max(running, key=lambda r: (self.priority[r], r))
        if urgency is not None and self.priority[request] <= urgency:
            return False
        self.gave_way[request] += 1
        self.computed[request] = self.cached[request]
        if request in self.decoding:
            self._leave(request)
            self._forget_ends()
            if self.rules.preemption == "swap":
                self.swapped.add(request)
                self.swap_s += self.held[request] * self.pool.swap_s_per_block
        else:
            self.prefilling.remove(request)
        self.free += self.held[request]
        heappush(self.waiting, (self.priority[request], request))
        return True


def _steps_until(gap_s: float, first_s: float, slope_s: float, most: int) -> int:
    """The least number of iterations, up to ``most``, whose sum reaches ``gap_s``: ``jf + sj(j − 1)/2 ≥ gap``."""
    if most * first_s + slope_s * (most * (most - 1) // 2) < gap_s:
        return most
    half = first_s - 0.5 * slope_s
    root = (
        gap_s / first_s
        if slope_s == 0.0
        else 2.0 * gap_s / (half + sqrt(half * half + 2.0 * slope_s * gap_s))
    )
    steps = min(max(ceil(root), 1), most)
    while steps < most and steps * first_s + slope_s * (steps * (steps - 1) // 2) < gap_s:
        steps += 1
    while steps > 1 and (steps - 1) * first_s + slope_s * ((steps - 1) * (steps - 2) // 2) >= gap_s:
        steps -= 1
    return steps
