"""What a serving deployment has to answer: lengths and rate of requests, and the latencies that were promised."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import Problem, SpecError
from planner.specs.ranges import out_of_range

__all__ = ["ADAPTER_RANK", "Traffic"]

ADAPTER_RANK = 16
"""Largest rank of adapters where none is given: vLLM's ``--max-lora-rank``."""
# Field → (least, most, whole number?). Far beyond any real deployment: they catch a slip of the keyboard.
_LIMITS = {
    "isl": (1, 10**8, True),
    "osl": (1, 10**7, True),
    "rate_per_s": (1e-9, 1e9, False),
    "concurrency": (1, 10**7, True),
    "ttft_s": (1e-6, 1e6, False),
    "tpot_s": (1e-7, 1e4, False),
    "e2e_s": (1e-6, 1e7, False),
    "percentile": (1, 99.99, False),
    "prefix_hit": (0, 0.999, False),
    "length_scv": (0, 100, False),
    "expert_load_factor": (1, 10**4, False),
    "requests_per_client": (1, 10**7, False),
    "adapters": (1, 10**4, True),
    "adapter_rank": (1, 10**4, True),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests and promises.

    Attributes:
        isl: tokens of a prompt, mean.
        osl: tokens of an answer, mean; the first comes out of the prompt's pass.
        rate_per_s: requests that arrive per second, Poisson; None with a ``concurrency``, or where the highest load is asked for.
        concurrency: requests in flight that clients keep up; a finished one is replaced at once.
        ttft_s, tpot_s, e2e_s: limits of time to the first token, time per further token, and of the whole answer.
        percentile: of requests that must keep the limits; None: the means must.
        prefix_hit: fraction of prompt tokens whose keys and values are in the cache already.
        requests_per_client: requests that each of ``concurrency`` clients sends in all, the first of all clients at once; None: a
            run without an end, whose beginning does not count.
        length_scv: squared coefficient of variation of answers' lengths; 0: all are equal.
        adapters: low-rank adapters that run at once, of rank up to ``adapter_rank`` (16 unless given); None: none.
        expert_load_factor: busiest expert rank relative to the mean, where it is measured; None: random routing's own.

    Raises:
        SpecError: a number is out of range, or two of them contradict each other (all problems at once).
    """

    isl: int
    osl: int
    rate_per_s: float | None = None
    concurrency: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    percentile: float | None = None
    prefix_hit: float = 0.0
    length_scv: float = 0.0
    expert_load_factor: float | None = None
    requests_per_client: float | None = None
    adapters: int | None = None
    adapter_rank: int | None = None

    def __post_init__(self) -> None:
        faults = out_of_range(self, _LIMITS)
        if self.rate_per_s is not None and self.concurrency is not None:
            faults.append(
                Problem("rate_per_s", "is given beside a concurrency", "one of them", "Leave one out.")
            )
        if self.adapter_rank is not None and self.adapters is None:
            faults.append(Problem("adapter_rank", "is given without adapters", "how many run at once"))
        if faults:
            raise SpecError(faults)

    @property
    def computed_isl(self) -> float:
        """Prompt tokens that have to be computed, mean."""
        return max(1.0, self.isl * (1.0 - self.prefix_hit))

    @property
    def prompt_context(self) -> float:
        """Keys that a computed prompt token attends to, itself included, mean."""
        return self.isl - self.computed_isl + (self.computed_isl + 1.0) / 2.0
