"""What a search lists, once more: every plan at the load that the chains' latencies allow, with their percentiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from planner.engine.pricer import Pricer
from planner.load.iteration_time import Sampled
from planner.serving.candidates import iterations_of
from planner.serving.disaggregated import Split
from planner.serving.percentiles import (
    NEARLY,
    Latencies,
    Line,
    decode_pool,
    highest_rate,
    mixed_pool,
    prefill_pool,
)
from planner.serving.search import Found
from planner.serving.space import mesh_of
from planner.specs.serve_problem import ServeProblem
from planner.specs.traffic import Traffic

__all__ = ["Listing"]

_LATENCIES = ("ttft", "tpot", "e2e")
_MORE_REPLICAS = 4  # of a pool, tried where those of the means do not keep the limits at a given rate


@dataclass(frozen=True, slots=True)
class Listing:
    """Puts plans through the chains; tables of pools that several plans share are made once."""

    problem: ServeProblem
    pricer: Pricer
    _lines: dict[Any, Line] = field(default_factory=dict)

    def of(self, found: Found | Split) -> Found | Split | None:
        """The plan with the latencies of arrivals of their own, at a load that keeps the limits; None where none near it does.

        Clients that replace every answer at once have no arrivals: their latencies are those of the steady state.
        """
        if isinstance(found, Split):
            return self._split(found)
        return self._mixed(found) if self.problem.traffic.concurrency is None else found

    def _mixed(self, f: Found) -> Found | None:
        traffic = self.problem.traffic
        line = self._line(f.recipe, f.row, f.chunk, f.most)

        def latencies(rate_per_s: float) -> Latencies:
            if traffic.osl <= 1:
                ttft = prefill_pool(line, traffic, rate_per_s)
                return self._admitted(Latencies(ttft, dict.fromkeys(ttft, 0.0)))
            return self._admitted(mixed_pool(line, traffic, f.most, float(f.in_flight), rate_per_s))

        size = f.devices // f.replicas
        for replicas in range(f.replicas, self._most(f.replicas, size) + 1):
            kept = highest_rate(latencies, traffic, f.tokens_per_s / traffic.osl / replicas, f.most_per_s)
            if kept is not None:
                rate, found = kept
                held = rate * (found.ttft_s["mean"] + (traffic.osl - 1.0) * found.tpot_s["mean"])
                in_flight = int(np.ceil(min(held, f.most)))
                served = rate * replicas * traffic.osl
                return replace(
                    f, replicas=replicas, in_flight=in_flight, tokens_per_s=served, latencies=found,
                    binding=_binding(f.binding, rate, f.most_per_s, found, traffic),
                )  # fmt: skip
        return None

    def _split(self, f: Split) -> Split | None:
        traffic = self.problem.traffic
        prompts = self._line(f.recipes[0], f.rows[0], f.chunk, 1.0)
        apart = "batches_in_turn" in f.recipes[1]
        answers = self._turns(f) if apart else self._line(f.recipes[1], f.rows[1], 2.0, f.most)

        def latencies(rate_per_s: float) -> Latencies:
            ttft = prefill_pool(prompts, traffic, rate_per_s / f.replicas[0])
            tpot = decode_pool(answers, traffic, f.most, rate_per_s / f.replicas[1])
            return self._admitted(Latencies({n: s + f.transfer_s for n, s in ttft.items()}, tpot))

        if traffic.concurrency is not None:
            return f
        kept = highest_rate(latencies, traffic, f.requests_per_s, f.requests_per_s)
        if kept is None:
            return None
        rate, found = kept
        in_flight = int(
            np.ceil(min(rate / f.replicas[1] * (traffic.osl - 1.0) * found.tpot_s["mean"], f.most))
        )
        binding = f.binding if rate >= f.requests_per_s else _binding(f.binding, rate, np.inf, found, traffic)
        return replace(f, binding=binding, requests_per_s=rate, in_flight=max(in_flight, 1), latencies=found)

    def _admitted(self, found: Latencies) -> Latencies:
        assert self.pricer.stack.serving is not None
        seconds = float(self.pricer.stack.serving.admitted_s(self.problem.traffic.isl))
        return replace(found, ttft_s={name: value + seconds for name, value in found.ttft_s.items()})

    def _most(self, replicas: int, size: int) -> int:
        """Replicas to go up to: those that are there where a rate is given, no others where the load is what is searched."""
        if self.problem.traffic.rate_per_s is None or "replicas" in self.problem.fixed:
            return replicas
        return min(replicas + _MORE_REPLICAS, self.problem.cluster.devices // size)

    def _line(self, recipe: Mapping[str, str], row: Any, chunk: float, decodes: float) -> Line:
        key = (tuple(recipe.items()), tuple(row), chunk, decodes)
        if key not in self._lines:
            mesh = mesh_of(np.asarray(row)[None, :])
            iterations = iterations_of(self.problem, recipe, mesh, self.pricer)
            self._lines[key] = Line.of(iterations, self.problem.traffic, decodes, chunk * float(mesh.dp[0]))
        return self._lines[key]

    def _turns(self, f: Split) -> Line:
        """Of replicas whose attention and experts are apart: an iteration is a token of all their micro-batches."""
        from planner.serving.ping_pong import sides_of, turn_price

        recipe, row = f.recipes[1], f.rows[1]
        key = (tuple(recipe.items()), tuple(row), f.most)
        if key not in self._lines:
            sides = sides_of(self.problem, recipe, np.asarray(row)[None, :], self.pricer)
            price = turn_price(self.problem, sides, float(recipe["batches_in_turn"]))
            typical = float(self.problem.traffic.isl + self.problem.traffic.osl)
            self._lines[key] = Line(Sampled.of(price, max(int(f.most), 1), 2, typical), 1.0, 2.0)
        return self._lines[key]


def _binding(before: str, rate: float, most: float, found: Latencies, traffic: Traffic) -> str:
    """What keeps the load from growing: the limit that is nearly reached, or if none is, what holds no more."""
    if traffic.rate_per_s is not None:
        return before
    ratio, limit = found.missed(traffic)
    if rate < most and ratio > NEARLY:
        return limit
    return "memory" if before in _LATENCIES else before
