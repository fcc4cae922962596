"""A batch between two of its iterations, and what changes it: admissions, iterations, ends and preemptions."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil, sqrt

from planner.load.intake import Intake
from planner.load.iteration_time import IterationTime
from planner.load.scheduler import Scheduler

__all__ = ["Batch"]

_FOREVER = 2**62


class Batch:
    """A batch of running requests: the only one of a replica, or one of those in its pipeline.

    A decode that joined after ``D0`` decode iterations ends after ``D0 + its tokens``: the running batch is a heap of ends,
    and its context ``Σ(tokens held − D0)`` plus ``n`` times the count of iterations.
    """

    def __init__(
        self,
        intake: Intake,
        iteration: IterationTime,
        scheduler: Scheduler,
        ends_s: Callable[[float, float], float] | None = None,
    ) -> None:
        self.ends_s = (
            ends_s  # when work that starts then and lasts so long is done, if others may be in its way
        )
        self.intake, self.iteration, self.rules, self.pool = intake, iteration, scheduler, intake.pool
        # The same lists in every batch of a replica.
        self.arrival, self.prompt, self.output = intake.arrival, intake.prompt, intake.output
        self.priority, self.computed = intake.priority, intake.computed
        self.made, self.held, self.swapped = intake.made, intake.held, intake.swapped
        self.waiting, self.prefilling = intake.waiting, intake.prefilling
        self.now_s = self.busy_s = 0.0
        self.decoding: dict[int, int] = {}  # request -> decode iteration in which it joined
        self.ends: list[
            tuple[int, int, int]
        ] = []  # a heap of (last decode iteration, request, when it joined)
        self.steps = 0  # decode iterations so far
        self.offset = 0  # Σ over decodes of tokens attended to at the next step, minus the steps so far
        self.phase = [0] * self.pool.block_tokens  # decodes that enter a block, by (steps mod block)
        self.swap_s = self.ended_s = 0.0
        self.stepped = 0  # decode iterations under way
        self.ended: list[int] = []  # requests whose prompts end with the iteration under way
        self.iterations = self.request_iterations = 0
        self.log: list[tuple[float, float, int]] = []

    # -- one iteration, or a stretch of equal ones -----------------------------------------------------------------------

    def advance(self) -> None:
        """Runs up to the next moment at which the batch may change."""
        if not (self.waiting or self.prefilling or self.decoding):
            self.now_s = max(self.now_s, self.arrival[self.intake.arrived])
        begun = self.begin(_FOREVER)
        assert begun, "an iteration holds something"
        self.complete()

    def begin(self, most: int) -> bool:
        """Takes up an iteration, or up to ``most`` equal ones in a row; whether there was anything to do."""
        self.intake.take_arrivals(self.now_s)
        displaced = self.rules.mixed and self._make_room()
        chunks = self._chunks(admits=not displaced)
        if chunks:
            self._iterate(chunks, len(self.decoding) if self.rules.mixed else 0)
            return True
        displaced = self._make_room() or displaced
        if not self.decoding:
            return False
        self._stretch(len(self.decoding), 1 if displaced else most)
        return True

    def complete(self) -> None:
        """What ends with what was begun: decodes, and prompts, whose requests decode from now on."""
        self.steps += self.stepped
        self._end_decodes()
        if self.ended:
            self._end_prefills()

    def _iterate(self, chunks: list[tuple[int, int]], decodes: int) -> None:
        tokens, attended = self._prefill_load(chunks)
        base_s, per_context_s, per_prefill_s = self.iteration.line(decodes, tokens)
        context = self.offset + decodes * self.steps if decodes else 0
        seconds = base_s + per_context_s * context + per_prefill_s * attended
        late_s = self._pass(seconds + self.swap_s, 1, decodes + len(chunks))
        self.stepped = 1 if decodes else 0
        if decodes:
            self.log.append((seconds + late_s, seconds + late_s, decodes))
            self.intake.free -= self._growth(1)
        for request, tokens in chunks:
            self.computed[request] += tokens
        self.ended = [request for request, _ in chunks if self._missing(request) == 0]
        if self.ended:
            over = set(self.ended)
            self.prefilling[:] = [request for request in self.prefilling if request not in over]

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
        if self._growth(count) > self.intake.free:
            count = self._affordable()
        heeds_arrivals = not self.waiting or self.rules.order == "priority"
        if heeds_arrivals and not self.rules.gated and self.intake.arrived < len(self.arrival):
            count = _steps_until(self.arrival[self.intake.arrived] - self.now_s, first_s, slope_s, count)
        seconds = count * first_s + slope_s * (count * (count - 1) // 2)
        late_s = self._pass(seconds + self.swap_s, count, decodes)
        self.log.append((first_s + late_s, first_s + slope_s * (count - 1) + late_s, decodes * count))
        self.intake.free -= self._growth(count)
        self.stepped, self.ended = count, []

    def _pass(self, seconds: float, iterations: int, requests: int) -> float:
        """Lets so many seconds of work pass; by how much others have held up the tokens that end with it."""
        before_s = self.ended_s if self.decoding else self.now_s
        self.now_s = self.now_s + seconds if self.ends_s is None else self.ends_s(self.now_s, seconds)
        self.ended_s = self.now_s
        self.busy_s += seconds
        self.swap_s = 0.0
        self.iterations += iterations
        self.request_iterations += iterations * requests
        return 0.0 if self.ends_s is None else self.now_s - before_s - seconds

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
            self.intake.running >= self.rules.max_requests
            or self.intake.free - blocks - (self._growth(1) if self.rules.mixed else 0) < margin
        ):
            if self.rules.order != "priority" or not self._displace(self.priority[request]):
                return False
        heappop(self.waiting)
        self.intake.running += 1
        if request not in self.swapped:
            self.held[request] = blocks
        self.intake.free -= self.held[request]
        return True

    def _resume(self, request: int) -> None:
        self.swapped.remove(request)
        self.swap_s += self.held[request] * self.pool.swap_s_per_block
        self._join(request)

    # -- ends ------------------------------------------------------------------------------------------------------------

    def _end_prefills(self) -> None:
        ended, self.ended = self.ended, []
        for request in ended:
            self.made[request] += 1
            if self.intake.first[request] < 0.0:
                self.intake.first[request] = self.now_s
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
        self.intake.end(request, self.now_s)

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
        count = max(self.intake.free // len(self.decoding) * self.pool.block_tokens, 1)
        while self._growth(count + 1) <= self.intake.free:
            count += 1
        return count

    def _make_room(self) -> bool:
        """Requests give way until all others can decode a token; whether any did."""
        displaced = False
        while self._growth(1) > self.intake.free:
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
        self.intake.gave_way[request] += 1
        self.intake.running -= 1
        self.computed[request] = self.intake.cached[request]
        if request in self.decoding:
            self._leave(request)
            self._forget_ends()
            if self.rules.preemption == "swap":
                self.swapped.add(request)
                self.swap_s += self.held[request] * self.pool.swap_s_per_block
        else:
            self.prefilling.remove(request)
        self.intake.free += self.held[request]
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
