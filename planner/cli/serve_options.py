"""The options of ``planner serve``: the model, its traffic and promises, and what a deployment may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from planner.cli.options import option
from planner.cli.traffic_options import TRAFFIC_FLAGS, TrafficOptions
from planner.cli.values import (
    attempt,
    optional_number,
    optional_whole,
    parse_fixed,
    raise_if_any,
    read_cluster,
    read_list,
    read_model,
    read_stack,
    read_top,
)
from planner.errors import Problem as Fault
from planner.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from planner.serving.launcher import ServingLauncher
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model
    from planner.specs.serve_problem import ServeProblem
    from planner.specs.speculation import Speculation
    from planner.specs.stack import Stack
    from planner.specs.traffic import Traffic

__all__ = ["ServeOptions"]

_HEADROOM, _MOST_HEADROOM = 0.2, 100.0
_FLAGS = {
    **TRAFFIC_FLAGS, "model": "--model", "stack": "--engine", "cluster": "--cluster", "objective": "--objective",
    "usd_per_device_hour": "--usd-per-hour", "acceptance": "--acceptance", "tokens": "--draft-tokens", "draft": "--draft",
}  # fmt: skip
_PRECISIONS = {"fp4": "nvfp4", "int4": "int4_wo", "int8": "int8_wo", "mxfp4": "w4a16_mxfp4"}
_NARROWER = ("fp8", "nvfp4")


@dataclass(frozen=True, eq=False)
class ServeOptions:
    """A deployment as the command line asks for it; None means that the option was left out."""

    model: Annotated[
        str | None, option("--model", text="Shipped model, .toml, or config.json. Required.")
    ] = None
    cluster: Annotated[
        str | None,
        option(
            "--cluster",
            text="DEVICE:NODESxDEVICES, a shipped cluster, or .toml; a+b: pools on both. Required.",
        ),
    ] = None
    traffic: TrafficOptions = field(default_factory=TrafficOptions)
    precision: Annotated[
        str | None,
        option(
            "--precision",
            text="Weights: bf16, fp8, fp8_block, nvfp4, int4_wo … [as published]",
            metavar="LIST",
        ),
    ] = None
    cache: Annotated[
        str | None, option("--cache", text="Format of keys and values: bf16, fp8 [bf16].", metavar="LIST")
    ] = None
    allow: Annotated[
        list[str] | None,
        option("--allow", text="'lossy': also narrower weights and caches.", metavar="WHAT"),
    ] = None
    draft: Annotated[
        str | None,
        option(
            "--draft",
            text="Who drafts tokens: a smaller model, eagle[:HUB_NAME], mtp, or ngram; needs --acceptance.",
            metavar="WHO",
        ),
    ] = None
    draft_tokens: Annotated[
        str | None,
        option("--draft-tokens", text="Tokens per step to choose from [1,2,3,4,5,7].", metavar="LIST"),
    ] = None
    engine: Annotated[
        str,
        option(
            "--engine",
            "--for",
            text="vllm, sglang, trtllm: their times and rules; or a stack's .toml [vllm].",
            metavar="NAME",
        ),
    ] = "vllm"
    mode: Annotated[
        str | None,
        option(
            "--mode",
            text="aggregated, disaggregated [both], ping_pong of attention and experts, static, or offloaded.",
            metavar="MODE",
        ),
    ] = None
    fix: Annotated[
        list[str] | None,
        option("--fix", text="Every plan must have this, e.g. tp=8. Repeatable.", metavar="KNOB=VALUE"),
    ] = None
    forbid: Annotated[
        list[str] | None,
        option("--forbid", text="No plan may match this, e.g. 'pp=*'. Repeatable.", metavar="GLOB"),
    ] = None
    lora: Annotated[
        str | None,
        option("--lora", text="Low-rank adapters that run at once beside the model.", metavar="N"),
    ] = None
    lora_rank: Annotated[str | None, option("--lora-rank", text="Their rank, at most [16].", metavar="R")] = (
        None
    )
    explore: Annotated[
        list[str] | None,
        option(
            "--explore",
            text="Try choices that are left aside otherwise: 'cache_copies=*', or all. Repeatable.",
            metavar="GLOB",
        ),
    ] = None
    objective: Annotated[
        str,
        option(
            "--objective",
            text="Most answers (throughput), or least usd or energy per token [throughput].",
            metavar="NAME",
        ),
    ] = "throughput"
    daily: Annotated[
        str | None,
        option(
            "--daily",
            text="Requests per second in equal periods of a day: a,b,c … or a file with one a line.",
            metavar="LOAD",
        ),
    ] = None
    headroom: Annotated[
        str | None,
        option("--headroom", text="Of every period's load, kept free beside it [0.2].", metavar="X"),
    ] = None
    usd_per_hour: Annotated[
        str | None,
        option("--usd-per-hour", text="Price per device and hour [the device profile's].", metavar="USD"),
    ] = None
    top: Annotated[str, option("--top", text="Plans to list [10].", metavar="K")] = "10"

    def read(self) -> tuple[ServeProblem, int, tuple[tuple[float, ...], float] | None]:
        """The problem, how many plans to list, and the day whose load the deployment follows, if any.

        Raises:
            SpecError: all that is wrong with the options.
        """
        faults: list[Fault] = []
        adapters, rank = (
            optional_whole(faults, flag, text)
            for flag, text in (("--lora", self.lora), ("--lora-rank", self.lora_rank))
        )
        traffic = self.traffic.read(faults, adapters, rank)
        problem = self._problem(faults, traffic, self._speculation(faults))
        day = self._day(faults)
        top = attempt(faults, read_top, self.top)
        raise_if_any(faults)
        assert problem is not None
        assert top is not None
        return problem, top, day

    def _problem(
        self, faults: list[Fault], traffic: Traffic | None, speculation: Speculation | None
    ) -> ServeProblem | None:
        from planner.specs.serve_problem import ServeProblem

        model = attempt(faults, read_model, self.model, flags=_FLAGS)
        clusters = self._clusters(faults)
        stack = attempt(faults, _read_engine, self.engine, flags=_FLAGS)
        fixed = attempt(faults, parse_fixed, self.fix or [])
        price = optional_number(faults, "--usd-per-hour", self.usd_per_hour)
        allow = self.allow or []
        faults += [Fault("--allow", repr(what), "lossy") for what in allow if what != "lossy"]
        modes = self._modes(faults)
        if model is None or clusters is None or stack is None or traffic is None or fixed is None:
            return None
        first, *others = clusters
        lossy = "lossy" in allow
        formats = _formats(
            model, self.model or "", self.precision, first.device.peak_flop_per_s if lossy else ()
        )
        wider_caches = ("bf16", "fp8") if lossy and first.device.supports("fp8") else ("bf16",)
        caches = read_list(self.cache) if self.cache else wider_caches
        return attempt(
            faults, ServeProblem, model, first, traffic, stack, formats, caches, modes, fixed, tuple(self.forbid or ()),
            objective=self.objective.lower(), usd_per_device_hour=price, speculation=speculation,
            others=tuple(others), explore=tuple(self.explore or ()), launcher=_launcher(stack.name, modes), flags=_FLAGS,
        )  # fmt: skip

    def _clusters(self, faults: list[Fault]) -> list[Cluster] | None:
        """The machines of ``a+b``; None where one of them cannot be read."""
        if self.cluster is None:
            faults.append(Fault("--cluster", "is missing", "a cluster, such as h200-sxm:4x8"))
            return None
        each = [attempt(faults, read_cluster, part.strip(), flags=_FLAGS) for part in self.cluster.split("+")]
        found = [cluster for cluster in each if cluster is not None]
        return found if len(found) == len(each) else None

    def _modes(self, faults: list[Fault]) -> tuple[str, ...]:
        from planner.serving.space import MODES

        if self.mode is None:
            return ("aggregated", "disaggregated")
        mode = self.mode.lower()
        if mode not in MODES:
            hint = did_you_mean(mode, MODES)
            faults.append(Fault("--mode", repr(self.mode), f"one of {', '.join(MODES)}", hint))
        return (mode,)

    def _day(self, faults: list[Fault]) -> tuple[tuple[float, ...], float] | None:
        headroom = optional_number(faults, "--headroom", self.headroom)
        if self.daily is None:
            if self.headroom is not None:
                expected = "--daily with the load of its periods"
                faults.append(Fault("--headroom", "is given without a day", expected))
            return None
        for flag, value in (("--rate", self.traffic.rate), ("--concurrency", self.traffic.concurrency)):
            if value is not None:
                faults.append(Fault(flag, "is given beside --daily", "one of them", "Leave one out."))
        if headroom is not None and not 0.0 <= headroom <= _MOST_HEADROOM:
            faults.append(Fault("--headroom", f"{headroom:g}", f"a fraction from 0 to {_MOST_HEADROOM:g}"))
        return _daily_rates(faults, self.daily), _HEADROOM if headroom is None else headroom

    def _speculation(self, faults: list[Fault]) -> Speculation | None:
        from planner.specs.speculation import METHODS, Speculation

        chance = self.traffic.read_acceptance(faults)
        if self.draft is None:
            given = (("--acceptance", self.traffic.acceptance), ("--draft-tokens", self.draft_tokens))
            expected = "--draft eagle, mtp, ngram or a smaller model"
            faults += [
                Fault(flag, "is given without a draft", expected)
                for flag, value in given
                if value is not None
            ]
            return None
        if self.traffic.acceptance is None:
            faults.append(Fault("--acceptance", "is missing", "a measured probability, such as 0.7"))
        choices = read_list(self.draft_tokens or "1,2,3,4,5,7")
        counts = [optional_whole(faults, "--draft-tokens", text) for text in choices]
        named, _, head = self.draft.partition(":")  # eagle:HUB_NAME
        model, method = None, named.lower()
        if method not in METHODS or method == "draft":
            model, method = attempt(faults, read_model, self.draft, flags={"model": "--draft"}), "draft"
        if chance is None or None in counts or (method == "draft" and model is None):
            return None
        return attempt(faults, Speculation, method, chance, tuple(counts), model, head, flags=_FLAGS)


# -- details -----------------------------------------------------------------------------------------------------------------


def _read_engine(text: str) -> Stack:
    """The stack of a serving engine.

    Raises:
        SpecError: there is no such stack; names those that serve.
    """
    from planner.specs.stack import list_stacks, load_stack

    if text.endswith(".toml") or text in list_stacks():
        return read_stack(text)
    known = [name for name in list_stacks() if load_stack(name).serving is not None]
    expected = f"a .toml file, or one of {', '.join(known)}"
    raise SpecError(Fault("stack", repr(text[:80]), expected, did_you_mean(text, known)))


def _launcher(stack: str, modes: tuple[str, ...]) -> ServingLauncher | None:
    """The engine that a plan is for: what it refuses is not searched. Offloaded plans are FlexGen's, static ones nobody's,
    and attention apart from experts MegaScale-Infer's."""
    from planner.export.serving.rules import SERVING_LAUNCHERS

    return None if modes in (("offloaded",), ("static",), ("ping_pong",)) else SERVING_LAUNCHERS.get(stack)


def _daily_rates(faults: list[Fault], daily: str) -> tuple[float, ...]:
    """Requests per second in equal periods of a day: in the text itself, or in the file that it names."""
    if not Path(daily).is_file() and ("/" in daily or Path(daily).suffix in (".csv", ".txt")):
        faults.append(
            Fault("--daily", f"no file {daily[:80]!r}", "numbers as a,b,c … or a file with one a line")
        )
        return ()
    text = Path(daily).read_text(encoding="utf-8") if Path(daily).is_file() else daily
    parts = [part for part in text.replace("\n", ",").split(",") if part.strip()]
    wrong: list[Fault] = []
    rates = [optional_number(wrong, "--daily", part) for part in parts]
    found = [rate for rate in rates if rate is not None]
    wrong += [Fault("--daily", f"{rate:g}", "requests per second from 0") for rate in found if rate < 0.0]
    if not wrong and not any(found):
        wrong.append(Fault("--daily", repr(daily[:40]), "requests per second of a day's periods, not all 0"))
    faults += wrong
    return tuple(found)


def _formats(spec: Model, given: str, precision: str | None, rates: Any) -> tuple[str, ...]:
    """Formats of weights: as asked for, as the model's name says, or as published; with ``rates``, narrower ones as well."""
    from planner.specs.models import named_precision

    asked = read_list(precision) if precision else (named_precision(given) or spec.checkpoint,)
    found = [_PRECISIONS.get(name, name) for name in asked]
    # A model that is published in blocks of fp8 has no other fp8 form.
    found = ["fp8_block" if name == "fp8" and spec.checkpoint == "fp8_block" else name for name in found]
    if precision is None:
        found += [name for name in _NARROWER if name.replace("nvfp4", "fp4") in rates and name not in found]
    return tuple(dict.fromkeys(found))
