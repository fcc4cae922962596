"""What a simulated run says: latencies with the error that a finite run leaves, and how busy the pool was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.load.simulator import Run

__all__ = ["Latency", "Summary", "settling", "summarize"]

Reals = npt.NDArray[np.float64]

_BATCHES = 20
_GROWN, _MANY = 1.5, 0.05
_T_95 = 2.093
"""Student's t for 95 % two-sided with 19 degrees of freedom: 20 batches."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one latency over requests; ``…_error`` is half of a 95 % confidence interval, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    mean_error: float
    p50_error: float
    p90_error: float
    p99_error: float

    @classmethod
    def of(cls, seconds: Reals, weights: Reals | None = None) -> Latency | None:
        """Of requests in order of arrival, the mean weighted; None without any.

        Neighbours are not independent, so errors come from 20 batches of neighbours: of their means, and of the
        fractions of them beyond a quantile, read back as seconds from the sample (Law, "Simulation Modeling and
        Analysis", 5th ed., sections 9.5.3 and 9.5.4).
        """
        if not len(seconds):
            return None
        batches = np.array_split(seconds, min(_BATCHES, len(seconds)))
        share = np.ones(len(seconds)) if weights is None else weights
        shares = np.array_split(share, len(batches))
        means = [np.average(batch, weights=part) for batch, part in zip(batches, shares, strict=True)]
        mean_error = _half_width(np.array(means))
        quantiles = [float(value) for value in np.quantile(seconds, (0.5, 0.9, 0.99))]
        p50_error, p90_error, p99_error = (
            _quantile_error(seconds, batches, level, value)
            for level, value in zip((0.5, 0.9, 0.99), quantiles, strict=True)
        )
        p50, p90, p99 = quantiles
        mean = float(np.average(seconds, weights=share))
        return cls(mean, p50, p90, p99, mean_error, p50_error, p90_error, p99_error)


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers.

    Attributes:
        ttft_s, tpot_s, e2e_s: to the first token; per output token after it (the mean over tokens, quantiles over
            requests); to the last token.
        iteration_s: of iterations that decode, by tokens: what a user sees between two tokens.
        output_tokens_per_s, requests_per_s: served, over the whole span.
        mean_requests: in the batch, over iterations.
        busy_fraction: of the span inside iterations.
        preempted_fraction: of requests that gave way at least once.
        waiting_at_end: requests without a first token when the last one comes.
        falls_behind: whether they are a twentieth of all and half as many again as when half had come: the queue grows as long
            as the run lasts, and so do times to the first token.
    """

    requests: int
    ttft_s: Latency | None
    tpot_s: Latency | None
    e2e_s: Latency | None
    iteration_s: dict[str, float]
    output_tokens_per_s: float
    requests_per_s: float
    mean_requests: float
    busy_fraction: float
    preempted_fraction: float
    iterations: int
    request_iterations: int
    waiting_at_end: int = 0
    falls_behind: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON fields."""
        return asdict(self)


def settling(run: Run) -> float:
    """The fraction of a synthetic run to leave out at each end: what arrives within two answers of it, a tenth to two fifths."""
    response_s = float(np.mean(run.finish_s - run.requests.arrival_s))
    return float(np.clip(2.0 * response_s / max(run.span_s, 1e-30), 0.1, 0.4))


def summarize(run: Run, settling: float = 0.0) -> Summary:
    """The run's latencies, without the first and last ``settling`` (a fraction) of its requests.

    A synthetic run starts and ends with an empty pool, a trace is what it is.
    """
    count = len(run.requests)
    edge = int(settling * count)
    kept = slice(edge, count - edge)
    arrival_s, output = run.requests.arrival_s[kept], run.requests.output_tokens[kept]
    first_s, finish_s = run.first_token_s[kept], run.finish_s[kept]
    halfway, at_end = (_waiting(run, last) for last in ((count - 1) // 2, count - 1))
    decoded = output > 1
    tpot_s = (finish_s - first_s)[decoded] / (output[decoded] - 1)
    span_s = max(run.span_s, np.finfo(float).tiny)
    return Summary(
        requests=len(arrival_s),
        ttft_s=Latency.of(first_s - arrival_s),
        tpot_s=Latency.of(tpot_s, (output[decoded] - 1).astype(float)),
        e2e_s=Latency.of(finish_s - arrival_s),
        iteration_s=_token_gaps(run.decode_iteration_s),
        output_tokens_per_s=float(np.sum(run.requests.output_tokens)) / span_s,
        requests_per_s=count / span_s,
        mean_requests=run.request_iterations / max(run.iterations, 1),
        busy_fraction=min(run.busy_s / span_s, 1.0),
        preempted_fraction=float(np.mean(run.preemptions > 0)),
        iterations=run.iterations,
        request_iterations=run.request_iterations,
        waiting_at_end=at_end,
        falls_behind=at_end > max(_GROWN * halfway, _MANY * count),
    )


def _waiting(run: Run, last: int) -> int:
    """Requests up to this one that have no first token when it comes."""
    return int(np.sum(run.first_token_s[: last + 1] > run.requests.arrival_s[last]))


def _token_gaps(stretches: Reals) -> dict[str, float]:
    """Quantiles of decode iterations weighted by their tokens; a stretch counts with its mean iteration."""
    first_s, last_s, tokens = stretches
    if not len(tokens):
        return {}
    middle_s = 0.5 * (first_s + last_s)
    order = np.argsort(middle_s)
    share = np.cumsum(tokens[order]) / np.sum(tokens)
    found = {"mean": float(np.sum(middle_s * tokens) / np.sum(tokens))}
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found[name] = float(middle_s[order][np.searchsorted(share, quantile)])
    return found


def _quantile_error(seconds: Reals, batches: list[Reals], level: float, value: float) -> float:
    spread = _half_width(np.array([np.mean(batch <= value) for batch in batches]))
    if np.isnan(spread):
        return spread
    low, high = np.quantile(seconds, np.clip([level - spread, level + spread], 0.0, 1.0))
    return float(0.5 * (high - low))


def _half_width(values: Reals) -> float:
    if len(values) < 2:
        return float("nan")
    return float(_T_95 * np.std(values, ddof=1) / np.sqrt(len(values)))
