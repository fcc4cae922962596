"""The options that say what a deployment has to answer: of ``planner serve``, and of launches that run already."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from planner.cli.options import option
from planner.cli.values import (
    attempt,
    optional_milliseconds,
    optional_number,
    optional_whole,
    raise_if_any,
)
from planner.errors import Problem as Fault

if TYPE_CHECKING:
    from planner.specs.traffic import Traffic

__all__ = ["TRAFFIC_FLAGS", "TrafficOptions"]

TRAFFIC_FLAGS = {
    "isl": "--isl", "osl": "--osl", "rate_per_s": "--rate", "concurrency": "--concurrency", "ttft_s": "--ttft-ms",
    "tpot_s": "--tpot-ms", "e2e_s": "--e2e-ms", "percentile": "--percentile", "prefix_hit": "--prefix-hit",
    "length_scv": "--length-scv", "adapters": "--lora", "adapter_rank": "--lora-rank",
}  # fmt: skip
"""Fields of the traffic → the options that set them."""


@dataclass(frozen=True, eq=False)
class TrafficOptions:
    """Requests to a deployment and what they are promised; None means that the option was left out."""

    isl: Annotated[
        str | None,
        option("--isl", text="Prompt tokens, mean: of a deployment, required.", metavar="N"),
    ] = None
    osl: Annotated[
        str | None, option("--osl", text="Answer tokens, mean: of a deployment, required.", metavar="N")
    ] = None
    ttft_ms: Annotated[
        str | None, option("--ttft-ms", text="Limit of the time to the first token.", metavar="MS")
    ] = None
    tpot_ms: Annotated[
        str | None, option("--tpot-ms", text="Limit of the time between tokens.", metavar="MS")
    ] = None
    e2e_ms: Annotated[
        str | None, option("--e2e-ms", text="Limit of the time of a whole answer.", metavar="MS")
    ] = None
    percentile: Annotated[
        str | None,
        option("--percentile", text="Of requests that keep the limits, e.g. 99 [the mean].", metavar="P"),
    ] = None
    rate: Annotated[
        str | None,
        option("--rate", text="Requests per second: how few devices? [highest load]", metavar="R"),
    ] = None
    concurrency: Annotated[
        str | None, option("--concurrency", text="Requests in flight that clients keep up.", metavar="C")
    ] = None
    prefix_hit: Annotated[
        str | None,
        option("--prefix-hit", text="Fraction of prompt tokens that are cached [0].", metavar="X"),
    ] = None
    length_scv: Annotated[
        str | None, option("--length-scv", text="Squared variation of answers' lengths [0].", metavar="X")
    ] = None
    acceptance: Annotated[
        str | None,
        option(
            "--acceptance",
            text="Probability that a drafted token is accepted; measured, 0 to 1.",
            metavar="X",
        ),
    ] = None

    def refuse(self, launcher: str | None) -> None:
        """Raises SpecError where a job that trains is given traffic."""
        of = "a job that trains" if launcher is None else f"--from {launcher}, which trains"
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        faults = [
            Fault(f"--{name.replace('_', '-')}", f"beside {of}", "--from vllm or sglang") for name in given
        ]
        raise_if_any(faults)

    def read(
        self, faults: list[Fault], adapters: int | None = None, rank: int | None = None
    ) -> Traffic | None:
        """The traffic, with low-rank adapters beside the model; None where something is missing or wrong, which is noted."""
        from planner.specs.traffic import Traffic

        for flag, text in (("--isl", self.isl), ("--osl", self.osl)):
            if text is None:
                faults.append(Fault(flag, "is missing", "tokens, such as 4000"))
        percentile = self.percentile and self.percentile.lower().removeprefix("p")
        values: dict[str, Any] = {
            "isl": optional_whole(faults, "--isl", self.isl),
            "osl": optional_whole(faults, "--osl", self.osl),
            "ttft_s": optional_milliseconds(faults, "--ttft-ms", self.ttft_ms),
            "tpot_s": optional_milliseconds(faults, "--tpot-ms", self.tpot_ms),
            "e2e_s": optional_milliseconds(faults, "--e2e-ms", self.e2e_ms),
            "percentile": optional_number(faults, "--percentile", percentile),
            "rate_per_s": _rate(faults, self.rate),
            "concurrency": optional_whole(faults, "--concurrency", self.concurrency),
            "prefix_hit": optional_number(faults, "--prefix-hit", self.prefix_hit) or 0.0,
            "length_scv": optional_number(faults, "--length-scv", self.length_scv) or 0.0,
            "adapters": adapters,
            "adapter_rank": rank,
        }
        if values["isl"] is None or values["osl"] is None:
            return None
        return attempt(faults, Traffic, flags=TRAFFIC_FLAGS, **values)

    def read_acceptance(self, faults: list[Fault]) -> float | None:
        """The probability that a drafted token is accepted; a fault is noted."""
        acceptance = optional_number(faults, "--acceptance", self.acceptance)
        if acceptance is not None and not 0.0 <= acceptance <= 1.0:
            faults.append(Fault("--acceptance", f"{acceptance:g}", "a probability from 0 to 1"))
            return None
        return acceptance


def _rate(faults: list[Fault], text: str | None) -> float | None:
    rate = optional_number(faults, "--rate", text)
    if rate is None or rate > 0.0:
        return rate
    hint = "Leave it out for the highest load that keeps the limits."
    faults.append(Fault("--rate", str(text), "requests per second above 0", hint))
    return None
