"""A replica of several pipeline stages: as many batches under way, one behind the other, and one queue for all of them.

Requests that wait are taken up by whichever batch next begins an iteration, as in engines that keep a single queue (SGLang's
``event_loop_pp`` goes round its micro-batches; vLLM's engine core schedules whatever is not in flight), and the next chunk of a
prompt need not wait for the end of the one before. Once its prompt is through, a request goes round with the batch that ended it.

All stages are equally long, a ``p``-th of the batch's way, and a batch cannot overtake: ``F_j(k) = max(F_{j−1}(k), F_j(k−1)) +
s(k)``, a proportionate flow shop. A long iteration therefore holds up the batches behind it at every stage: the pipeline bubbles
of unlike batches (A. Agrawal et al., "SARATHI", arXiv:2308.16369, section 3.3).
"""

from __future__ import annotations

from math import inf

from planner.load.engine import Batch
from planner.load.intake import Intake
from planner.load.iteration_time import IterationTime
from planner.load.scheduler import Scheduler

__all__ = ["Pipeline"]


class Pipeline:
    """The batches of a replica on their way through its stages."""

    def __init__(self, intake: Intake, iteration: IterationTime, scheduler: Scheduler, stages: int) -> None:
        self.intake = intake
        self.free_s = [0.0] * stages  # when each stage is done with what it has been given
        self.batches = [Batch(intake, iteration, scheduler, self._passed_s) for _ in range(stages)]
        self.under_way: set[int] = set()
        self.begun_s = [-inf] * stages

    def _passed_s(self, start_s: float, seconds: float) -> float:
        """When a batch leaves the last stage that enters the first then, and takes ``seconds`` if nothing is in its way."""
        each_s, at_s = seconds / len(self.free_s), start_s
        for stage, free_s in enumerate(self.free_s):
            at_s = (at_s if at_s > free_s else free_s) + each_s
            self.free_s[stage] = at_s
        return at_s

    def advance(self) -> None:
        """Begins the next iteration of the batch whose turn it is; what ends by then has ended before."""
        refused: set[int] = set()
        while self.intake.done < len(self.intake.requests):
            start_s, _, index = self._turn(refused)
            for done in [i for i in self.under_way if self.batches[i].now_s <= start_s]:
                self.under_way.remove(done)
                self.batches[done].complete()
                refused.clear()
            batch = self.batches[index]
            batch.now_s = start_s
            if batch.begin(1):
                self.under_way.add(index)
                self.begun_s[index] = start_s
                return
            refused.add(index)

    def _turn(self, refused: set[int]) -> tuple[float, float, int]:
        """When the next iteration can begin, and of which batch: of several, the one that has waited longest for its turn.

        A batch without requests takes up what waits, if it was not ``refused`` a slot or blocks, or what comes next.
        """
        intake, first_s = self.intake, self.free_s[0]
        waits = bool(intake.waiting or intake.prefilling)
        comes_s = intake.arrival[intake.arrived] if intake.arrived < len(intake.arrival) else inf
        turns = []
        for index, batch in enumerate(self.batches):
            if index in self.under_way or batch.decoding:
                turns.append((max(first_s, batch.now_s), self.begun_s[index], index))
            elif not (waits and index in refused):
                turns.append((first_s if waits else max(first_s, comes_s), self.begun_s[index], index))
        return min(turns)
