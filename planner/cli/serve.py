"""``planner serve``: the best deployments of a model for some traffic and its promises."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    whole_number,
)
from planner.errors import Problem as Fault

if TYPE_CHECKING:
    from planner.serving.launcher import ServingLauncher
    from planner.specs.model import Model
    from planner.specs.serve_problem import ServeProblem
    from planner.specs.speculation import Speculation
    from planner.specs.traffic import Traffic

__all__ = ["serve"]

_MOST_PLANS = 1000
_HEADROOM, _MOST_HEADROOM = 0.2, 100.0
_FLAGS = {
    "isl": "--isl", "osl": "--osl", "rate_per_s": "--rate", "concurrency": "--concurrency", "ttft_s": "--ttft-ms",
    "tpot_s": "--tpot-ms", "e2e_s": "--e2e-ms", "percentile": "--percentile", "prefix_hit": "--prefix-hit",
    "length_scv": "--length-scv", "adapters": "--lora", "adapter_rank": "--lora-rank", "model": "--model",
    "stack": "--engine", "cluster": "--cluster", "objective": "--objective",
    "usd_per_device_hour": "--usd-per-hour", "acceptance": "--acceptance", "tokens": "--draft-tokens", "draft": "--draft",
}  # fmt: skip
_PRECISIONS = {"fp4": "nvfp4", "int4": "int4_wo", "int8": "int8_wo", "mxfp4": "w4a16_mxfp4"}
_NARROWER = ("fp8", "nvfp4")


def _option(*names: str, text: str, metavar: str = "TEXT") -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def serve(
    model: Annotated[
        str | None, _option("--model", text="Shipped model, .toml, or config.json. Required.")
    ] = None,
    cluster: Annotated[
        str | None,
        _option(
            "--cluster",
            text="DEVICE:NODESxDEVICES, a shipped cluster, or .toml; a+b: pools on both. Required.",
        ),
    ] = None,
    isl: Annotated[str | None, _option("--isl", text="Prompt tokens, mean. Required.", metavar="N")] = None,
    osl: Annotated[str | None, _option("--osl", text="Answer tokens, mean. Required.", metavar="N")] = None,
    ttft_ms: Annotated[
        str | None, _option("--ttft-ms", text="Limit of the time to the first token.", metavar="MS")
    ] = None,
    tpot_ms: Annotated[
        str | None, _option("--tpot-ms", text="Limit of the time between tokens.", metavar="MS")
    ] = None,
    e2e_ms: Annotated[
        str | None, _option("--e2e-ms", text="Limit of the time of a whole answer.", metavar="MS")
    ] = None,
    percentile: Annotated[
        str | None,
        _option("--percentile", text="Of requests that keep the limits, e.g. 99 [the mean].", metavar="P"),
    ] = None,
    rate: Annotated[
        str | None,
        _option("--rate", text="Requests per second: how few devices? [highest load]", metavar="R"),
    ] = None,
    concurrency: Annotated[
        str | None, _option("--concurrency", text="Requests in flight that clients keep up.", metavar="C")
    ] = None,
    prefix_hit: Annotated[
        str | None,
        _option("--prefix-hit", text="Fraction of prompt tokens that are cached [0].", metavar="X"),
    ] = None,
    length_scv: Annotated[
        str | None, _option("--length-scv", text="Squared variation of answers' lengths [0].", metavar="X")
    ] = None,
    precision: Annotated[
        str | None,
        _option(
            "--precision",
            text="Weights: bf16, fp8, fp8_block, nvfp4, int4_wo … [as published]",
            metavar="LIST",
        ),
    ] = None,
    cache: Annotated[
        str | None, _option("--cache", text="Format of keys and values: bf16, fp8 [bf16].", metavar="LIST")
    ] = None,
    allow: Annotated[
        list[str] | None,
        _option("--allow", text="'lossy': also narrower weights and caches.", metavar="WHAT"),
    ] = None,
    draft: Annotated[
        str | None,
        _option(
            "--draft",
            text="Who drafts tokens: a smaller model, eagle[:HUB_NAME], mtp, or ngram; needs --acceptance.",
            metavar="WHO",
        ),
    ] = None,
    acceptance: Annotated[
        str | None,
        _option(
            "--acceptance",
            text="Probability that a drafted token is accepted; measured, 0 to 1.",
            metavar="X",
        ),
    ] = None,
    draft_tokens: Annotated[
        str | None,
        _option("--draft-tokens", text="Tokens per step to choose from [1,2,3,4,5,7].", metavar="LIST"),
    ] = None,
    engine: Annotated[
        str,
        _option(
            "--engine",
            "--for",
            text="vllm, sglang, trtllm: their times and rules; or a stack's .toml [vllm].",
            metavar="NAME",
        ),
    ] = "vllm",
    mode: Annotated[
        str | None,
        _option(
            "--mode", text="aggregated, disaggregated [both], or offloaded to host and disk.", metavar="MODE"
        ),
    ] = None,
    fix: Annotated[
        list[str] | None,
        _option("--fix", text="Every plan must have this, e.g. tp=8. Repeatable.", metavar="KNOB=VALUE"),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        _option("--forbid", text="No plan may match this, e.g. 'pp=*'. Repeatable.", metavar="GLOB"),
    ] = None,
    lora: Annotated[
        str | None,
        _option("--lora", text="Low-rank adapters that run at once beside the model.", metavar="N"),
    ] = None,
    lora_rank: Annotated[
        str | None, _option("--lora-rank", text="Their rank, at most [16].", metavar="R")
    ] = None,
    explore: Annotated[
        list[str] | None,
        _option(
            "--explore",
            text="Try choices that are left aside otherwise: 'cache_copies=*', or all. Repeatable.",
            metavar="GLOB",
        ),
    ] = None,
    objective: Annotated[
        str,
        _option(
            "--objective",
            text="Most answers (throughput), or least usd or energy per token [throughput].",
            metavar="NAME",
        ),
    ] = "throughput",
    daily: Annotated[
        str | None,
        _option(
            "--daily",
            text="Requests per second in equal periods of a day: a,b,c … or a file with one a line.",
            metavar="LOAD",
        ),
    ] = None,
    headroom: Annotated[
        str | None,
        _option("--headroom", text="Of every period's load, kept free beside it [0.2].", metavar="X"),
    ] = None,
    usd_per_hour: Annotated[
        str | None,
        _option("--usd-per-hour", text="Price per device and hour [the device profile's].", metavar="USD"),
    ] = None,
    top: Annotated[str, _option("--top", text="Plans to list [10].", metavar="K")] = "10",
    out: Annotated[
        str | None, _option("-o", "--out", text="Write the plans as JSON to a file.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Find the deployments that answer most within their promises, or take fewest devices for a rate.

    Prompts and generation in one pool, or in pools of their own; every mesh, budget of an iteration and number of replicas.
    """
    from planner.cli.output import OutputFile, json_text, print_json

    faults: list[Fault] = []
    traffic = _traffic(
        faults,
        isl,
        osl,
        ttft_ms,
        tpot_ms,
        e2e_ms,
        percentile,
        rate,
        concurrency,
        prefix_hit,
        length_scv,
        lora,
        lora_rank,
    )
    problem = _problem(
        faults,
        model,
        cluster,
        traffic,
        engine,
        precision,
        cache,
        allow or [],
        mode,
        fix,
        forbid,
        usd_per_hour,
        _speculation(faults, draft, acceptance, draft_tokens),
        objective,
        explore or [],
    )
    day = _day(faults, daily, headroom, rate, concurrency)
    wanted = attempt(faults, whole_number, "--top", top)
    if wanted is not None and not 1 <= wanted <= _MOST_PLANS:
        faults.append(Fault("--top", top, f"a whole number from 1 to {_MOST_PLANS}"))
    raise_if_any(faults)
    assert problem is not None
    assert wanted is not None

    from planner.serving.daily import over_a_day
    from planner.serving.serve import serve as search

    with OutputFile(out) if out is not None else nullcontext() as file:
        result = (
            search(problem, wanted) if day is None else over_a_day(search(problem, wanted), problem, *day)
        )
        content = result.as_dict()
        if file is not None:
            file.write(json_text(content) + "\n")
    if as_json:
        print_json(content)
    else:
        from planner.report.serving import show_serving

        show_serving(result, problem, out)


def _traffic(
    faults: list[Fault], isl: str | None, osl: str | None, ttft: str | None, tpot: str | None, e2e: str | None,
    percentile: str | None, rate: str | None, concurrency: str | None, prefix_hit: str | None, length_scv: str | None,
    lora: str | None, lora_rank: str | None,
) -> Traffic | None:  # fmt: skip
    from planner.specs.traffic import Traffic

    values: dict[str, Any] = {}
    for flag, text in (("--isl", isl), ("--osl", osl)):
        if text is None:
            faults.append(Fault(flag, "is missing", "tokens, such as 4000"))
        values[flag[2:]] = optional_whole(faults, flag, text)
    for name, flag, text in (
        ("ttft_s", "--ttft-ms", ttft),
        ("tpot_s", "--tpot-ms", tpot),
        ("e2e_s", "--e2e-ms", e2e),
    ):
        number = optional_number(faults, flag, text)
        values[name] = None if number is None else number * 1e-3
    values["percentile"] = optional_number(
        faults, "--percentile", percentile and percentile.lower().removeprefix("p")
    )
    values["rate_per_s"] = _rate(faults, rate)
    values["concurrency"] = optional_whole(faults, "--concurrency", concurrency)
    values["prefix_hit"] = optional_number(faults, "--prefix-hit", prefix_hit) or 0.0
    values["length_scv"] = optional_number(faults, "--length-scv", length_scv) or 0.0
    values["adapters"] = optional_whole(faults, "--lora", lora)
    values["adapter_rank"] = optional_whole(faults, "--lora-rank", lora_rank)
    if values["isl"] is None or values["osl"] is None:
        return None
    return attempt(faults, Traffic, flags=_FLAGS, **values)


def _rate(faults: list[Fault], text: str | None) -> float | None:
    rate = optional_number(faults, "--rate", text)
    if rate is None or rate > 0.0:
        return rate
    faults.append(
        Fault(
            "--rate",
            str(text),
            "requests per second above 0",
            "Leave it out for the highest load that keeps the limits.",
        )
    )
    return None


def _problem(
    faults: list[Fault], model: str | None, cluster: str | None, traffic: Traffic | None, engine: str, precision: str | None,
    cache: str | None, allow: list[str], mode: str | None, fix: list[str] | None, forbid: list[str] | None, price: str | None,
    speculation: Speculation | None, objective: str, explore: list[str],
) -> ServeProblem | None:  # fmt: skip
    from planner.errors import did_you_mean
    from planner.serving.space import MODES
    from planner.specs.serve_problem import ServeProblem

    spec = attempt(faults, read_model, model, flags=_FLAGS)
    machines = None
    if cluster is None:
        faults.append(Fault("--cluster", "is missing", "a cluster, such as h200-sxm:4x8"))
    else:
        each = [attempt(faults, read_cluster, part.strip(), flags=_FLAGS) for part in cluster.split("+")]
        read = [found for found in each if found is not None]
        machines = read if len(read) == len(each) else None
    stack = attempt(faults, read_stack, engine, flags=_FLAGS)
    fixed = attempt(faults, parse_fixed, fix or [])
    usd = optional_number(faults, "--usd-per-hour", price)
    faults += [Fault("--allow", repr(what), "lossy") for what in allow if what != "lossy"]
    modes = ("aggregated", "disaggregated") if mode is None else (mode.lower(),)
    if modes[0] not in MODES:
        faults.append(
            Fault("--mode", repr(mode), f"one of {', '.join(MODES)}", did_you_mean(modes[0], MODES))
        )
    if spec is None or machines is None or stack is None or traffic is None or fixed is None:
        return None
    lossy = "lossy" in allow
    formats = _formats(spec, model or "", precision, machines[0].device.peak_flop_per_s if lossy else ())
    caches = (
        read_list(cache)
        if cache
        else ("bf16", "fp8")
        if lossy and machines[0].device.supports("fp8")
        else ("bf16",)
    )
    return attempt(
        faults, ServeProblem, spec, machines[0], traffic, stack, formats, caches, modes, fixed, tuple(forbid or ()),
        objective=objective.lower(), usd_per_device_hour=usd, speculation=speculation,
        others=tuple(machines[1:]), explore=tuple(explore), launcher=_launcher(stack.name, modes), flags=_FLAGS,
    )  # fmt: skip


def _launcher(stack: str, modes: tuple[str, ...]) -> ServingLauncher | None:
    """The engine that a plan is for: what it refuses is not searched. Offloaded plans are FlexGen's."""
    from planner.export.serving.rules import SERVING_LAUNCHERS

    return None if modes == ("offloaded",) else SERVING_LAUNCHERS.get(stack)


def _day(
    faults: list[Fault], daily: str | None, headroom: str | None, rate: str | None, concurrency: str | None
) -> tuple[tuple[float, ...], float] | None:
    """Rates of a day's periods, and the headroom."""
    share = optional_number(faults, "--headroom", headroom)
    if daily is None:
        if headroom is not None:
            faults.append(
                Fault("--headroom", "is given without a day", "--daily with the load of its periods")
            )
        return None
    for flag, value in (("--rate", rate), ("--concurrency", concurrency)):
        if value is not None:
            faults.append(Fault(flag, "is given beside --daily", "one of them", "Leave one out."))
    text = Path(daily).read_text(encoding="utf-8") if Path(daily).is_file() else daily
    wrong: list[Fault] = []
    rates = [
        optional_number(wrong, "--daily", part) for part in text.replace("\n", ",").split(",") if part.strip()
    ]
    found = [number for number in rates if number is not None]
    wrong += [
        Fault("--daily", f"{number:g}", "requests per second from 0") for number in found if number < 0.0
    ]
    faults += wrong
    if not wrong and not any(found):
        faults.append(Fault("--daily", repr(daily[:40]), "requests per second of a day's periods, not all 0"))
    if share is not None and not 0.0 <= share <= _MOST_HEADROOM:
        faults.append(Fault("--headroom", f"{share:g}", f"a fraction from 0 to {_MOST_HEADROOM:g}"))
    return tuple(found), _HEADROOM if share is None else share


def _speculation(
    faults: list[Fault], draft: str | None, acceptance: str | None, tokens: str | None
) -> Speculation | None:
    from planner.specs.speculation import METHODS, Speculation

    chance = optional_number(faults, "--acceptance", acceptance)
    if draft is None:
        faults += [
            Fault(flag, "is given without a draft", "--draft eagle, mtp, ngram or a smaller model")
            for flag, value in (("--acceptance", acceptance), ("--draft-tokens", tokens))
            if value is not None
        ]
        return None
    if acceptance is None:
        faults.append(Fault("--acceptance", "is missing", "a measured probability, such as 0.7"))
    counts = [optional_whole(faults, "--draft-tokens", text) for text in read_list(tokens or "1,2,3,4,5,7")]
    named, _, head = draft.partition(":")  # eagle:HUB_NAME
    method = named.lower() if named.lower() in METHODS else "draft"
    model = attempt(faults, read_model, draft, flags={"model": "--draft"}) if method == "draft" else None
    if chance is None or None in counts or (method == "draft" and model is None):
        return None
    return attempt(faults, Speculation, method, chance, tuple(counts), model, head, flags=_FLAGS)


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
