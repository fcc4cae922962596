"""The screen of ``planner serve``: plans, their front, what they rest on, and how the space was exhausted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.errors import ExportError, SpecError
from planner.report.terminal import Screen, gib
from planner.serving.plan import Pool, ServeEstimate, ServePlan, ServeResult
from planner.specs.serve_problem import ServeProblem
from planner.units import counted, format_bytes, format_seconds

__all__ = [
    "pool_text",
    "serving_comparison",
    "show_account",
    "show_serve_plan",
    "show_serving",
    "show_serving_comparison",
]


def show_serving(result: ServeResult, problem: ServeProblem, saved: str | None) -> None:
    """Prints the result of a search; ``saved`` is the file that the plans were written to."""
    screen, report = Screen(), result.search
    traffic = problem.traffic
    limits = [
        f"{name} ≤ {value * 1e3:g} ms"
        for name, value in (("TTFT", traffic.ttft_s), ("TPOT", traffic.tpot_s), ("E2E", traffic.e2e_s))
        if value is not None
    ]
    where = "the mean" if traffic.percentile is None else f"p{traffic.percentile:g}"
    names = " + ".join(cluster.name for cluster in problem.clusters)
    screen.line(
        f"{problem.model.name} · {names} · {problem.stack.name} · {traffic.isl:,} in, {traffic.osl:,} out"
        + (f" · {', '.join(limits)} at {where}" if limits else "")
        + f" · {report.candidates:,} candidates · {report.wall_s:.1f} s",
        "bold",
    )
    screen.line()
    most, asked = problem.model.max_seq_len, traffic.isl + traffic.osl
    if asked > most:
        screen.line(
            f"{asked:,} tokens of a request are {asked / most:.3g} times the {most:,} that {problem.model.name} was made for: "
            "engines refuse them unless they are told to scale positions",
            "red",
        )
        screen.line()
    if result.days and result.days[0]["missing_devices"]:
        screen.line(f"{_day(result)[0]}; plans are of this cluster, their day of a larger one", "red")
        screen.line()
    rows = [_row(index, plan) for index, plan in enumerate(result.plans, 1)]
    headings = (
        "#",
        "id",
        "tok/s/device",
        "requests/s",
        "TTFT ms",
        "p99",
        "TPOT ms",
        "p99",
        "$/Mtok",
        "bound by",
    )
    pools = [" | ".join(pool_text(pool) for pool in plan.pools) for plan in result.plans]
    screen.grid(headings, rows, ("id", "bound by"), tail="pools", tails=pools)
    screen.section("Speed per user against speed per device", [_point(point) for point in result.pareto])
    if result.days:
        screen.section("Day", _day(result))
    screen.section("Rests on", result.best.assumptions)
    screen.section("How sure", _proof(result))
    screen.section("Next", [] if saved is None else _next(result, saved), wrapped=False)


def show_serve_plan(plan: ServePlan) -> None:
    """Prints one plan."""
    screen, e = Screen(), plan.estimate
    screen.line(
        f"{plan.model} · {plan.cluster} · {plan.stack} · {plan.mode} · {_devices(plan.devices)}", "bold"
    )
    screen.section("Pools", [pool_text(pool) for pool in plan.pools])
    times = [
        f"{name}: " + ", ".join(f"{which} {value * 1e3:.1f} ms" for which, value in values.items())
        for name, values in (
            ("time to first token", e.ttft_s),
            ("time between tokens", e.tpot_s),
            ("answer", e.e2e_s),
        )
    ]
    screen.section("Latency", times + _spread(e))
    price = (
        ""
        if e.usd_per_million_output_tokens is None
        else f" · ${e.usd_per_million_output_tokens:.2f} per million tokens"
    )
    screen.section(
        "Load",
        [
            f"{_few(e.goodput_requests_per_s, 2)} requests/s · "
            f"{_few(e.output_tokens_per_s_per_device)} output tokens/s per device"
            f"{price} · bound by {e.binding} · at most {e.max_concurrency:,} requests at once"
        ],
    )
    screen.section(
        "Memory of the fullest device (GiB)",
        [", ".join(f"{name} {gib(size)}" for name, size in e.memory_bytes.items())],
    )
    screen.section("Rests on", plan.assumptions)


def _spread(e: ServeEstimate) -> list[str]:
    """What should hold 80 % of measurements at a source that no constant has seen."""
    if not e.interval:
        return []
    (first, last), (low, high) = ([v * 1e3 for v in e.interval[name]] for name in ("ttft_s", "tpot_s"))
    return [
        f"80 % of published runs: first token {first:.0f} to {last:.0f} ms, between tokens {low:.1f} to {high:.1f} ms"
    ]


def show_account(pools: Sequence[Mapping[str, Any]], everything: bool) -> None:
    """Prints the items of every pool's iterations; small ones together unless ``everything`` is asked for."""
    screen = Screen()
    for pool in pools:
        for iteration in pool["iterations"]:
            screen.line()
            screen.line(f"{pool['role']}, {iteration['name']}: {iteration['seconds'] * 1e3:.2f} ms", "bold")
            items = [
                i for i in iteration["items"] if everything or i["seconds"] > _SMALL * iteration["seconds"]
            ]
            rows = [
                (
                    f"{i['seconds'] * 1e3:.3f}",
                    f"{i['seconds'] / iteration['seconds']:.1%}",
                    i["what"],
                    i["block"],
                    i["by"],
                )
                for i in items
            ]
            screen.grid(("ms", "share", "item", "block", "by"), rows, ("item", "block", "by"))


def serving_comparison(one: ServePlan, other: ServePlan) -> dict[str, Any]:
    """Two plans, quantity by quantity: choices that differ, and numbers with their ratio."""
    quantities: dict[str, tuple[float, float]] = {}
    for name in (
        "output_tokens_per_s_per_device",
        "goodput_requests_per_s",
        "max_concurrency",
        "joules_per_output_token",
    ):
        quantities[name] = (float(getattr(one.estimate, name)), float(getattr(other.estimate, name)))
    for name in ("ttft_s", "tpot_s", "e2e_s", "memory_bytes"):
        left, right = getattr(one.estimate, name), getattr(other.estimate, name)
        quantities |= {f"{name}.{key}": (left[key], right[key]) for key in left if key in right}
    return {
        "a": {"id": one.id, "pools": [pool_text(pool) for pool in one.pools], "devices": one.devices},
        "b": {"id": other.id, "pools": [pool_text(pool) for pool in other.pools], "devices": other.devices},
        "quantities": {
            name: {"a": a, "b": b, "ratio": b / a if a else None} for name, (a, b) in quantities.items()
        },
    }


def show_serving_comparison(content: Mapping[str, Any]) -> None:
    """Prints a comparison."""
    screen = Screen()
    for side in ("a", "b"):
        where = counted(content[side]["devices"], "device")
        screen.line(f"{side}: {content[side]['id']} on {where}: {' | '.join(content[side]['pools'])}")
    screen.line()
    rows = [
        (
            _words(name),
            *(_value(name, v[side]) for side in ("a", "b")),
            "" if v["ratio"] is None else f"{v['ratio']:.2f}",
        )
        for name, v in content["quantities"].items()
    ]
    screen.grid(("quantity", "a", "b", "b/a"), rows, ("quantity",))


_SMALL = 0.005
_WORDS = {
    "output_tokens_per_s_per_device": "output tokens/s per device", "goodput_requests_per_s": "requests/s",
    "max_concurrency": "requests at once, at most", "joules_per_output_token": "joules per output token",
    "ttft_s": "time to first token", "tpot_s": "time between tokens", "e2e_s": "answer", "memory_bytes": "memory",
}  # fmt: skip


def _words(quantity: str) -> str:
    """
    >>> _words("ttft_s.p99"), _words("memory_bytes.kv_cache")
    ('time to first token, p99', 'memory, kv cache')
    """
    name, _, part = quantity.partition(".")
    return _WORDS[name] + (f", {part.replace('_', ' ')}" if part else "")


def _value(quantity: str, value: float) -> str:
    name = quantity.partition(".")[0]
    if name == "memory_bytes":
        return format_bytes(value)
    return format_seconds(value) if name.endswith("_s") and "." in quantity else f"{value:.4g}"


def pool_text(pool: Pool) -> str:
    """A pool in words.

    >>> pool_text(Pool("aggregated", 4, {"tp": 2, "pp": 1, "dp": 1, "ep": 1, "etp": 2}, {"weights": "fp8"}, 30))
    '4 x tp 2, 30 in flight, fp8'
    """
    degrees = [
        f"{name} {pool.mesh[name]}" for name in ("tp", "cp", "pp", "dp", "ep") if pool.mesh.get(name, 1) > 1
    ] or ["1 device"]
    role = "" if pool.role == "aggregated" else f"{pool.role}: "
    role += f"{pool.cluster}: " if pool.cluster else ""
    degrees += ["dcp"] if pool.knobs.get("cache_copies") == "dcp" else []
    degrees += ["2 micro-batches"] if pool.knobs.get("micro_batches") == "2" else []
    flying = "" if pool.role in ("prefill", "experts") else f", {pool.in_flight} in flight"
    if pool.role == "attention":
        flying += f" in {pool.knobs['batches_in_turn']} micro-batches"
    chunk = f", budget {pool.knobs['chunk_tokens']}" if "chunk_tokens" in pool.knobs else ""
    draft = (
        f", {pool.knobs['draft_tokens']} drafted by {pool.knobs['draft']}" if "draft" in pool.knobs else ""
    )
    if "percent" in pool.knobs:
        shares = pool.knobs["percent"].split()
        names = ("weights", "cache", "activations")
        pairs = ", ".join(f"{n} {a}/{b}" for n, a, b in zip(names, shares[::2], shares[1::2], strict=True))
        block = f"{pool.knobs['gpu_batches']} batches of {pool.knobs['gpu_batch_size']}"
        return f"{pool.replicas} x 1 device, {block}, % device/host: {pairs}"
    return f"{role}{pool.replicas} x {' '.join(degrees)}{flying}, {pool.knobs['weights']}{chunk}{draft}"


def _row(index: int, plan: ServePlan) -> list[str]:
    e = plan.estimate
    price = "" if e.usd_per_million_output_tokens is None else f"{e.usd_per_million_output_tokens:.2f}"
    return [
        str(index), plan.id, _few(e.output_tokens_per_s_per_device), _few(e.goodput_requests_per_s, 2),
        f"{e.ttft_s['mean'] * 1e3:.0f}", f"{e.ttft_s['p99'] * 1e3:.0f}", f"{e.tpot_s['mean'] * 1e3:.1f}",
        f"{e.tpot_s['p99'] * 1e3:.1f}", price, e.binding,
    ]  # fmt: skip


def _day(result: ServeResult) -> list[str]:
    """The first plan's day."""
    day = result.days[0]
    periods, price = day["periods"], "" if day["usd"] is None else f", ${day['usd']:,.0f}"
    lines = [
        f"{day['device_hours']:,.0f} device hours{price} a day: {day['mean_devices']:.1f} devices on average, "
        f"{day['peak_devices']} at the peak; {day['saved']:.0%} less than that many all day; headroom {day['headroom']:.0%}"
    ]
    if day["missing_devices"]:
        lines.insert(
            0, f"not on this cluster: the peak takes {_devices(day['missing_devices'])} more than there are"
        )
    hours = 24.0 / len(periods)
    return lines + [
        f"{_clock(index * hours)}: {period['rate_per_s']:g} requests/s, replicas {' + '.join(map(str, period['replicas']))}, "
        f"{_devices(period['devices'])}, {period['utilization']:.0%} used"
        for index, period in enumerate(periods)
    ]


def _few(value: float, decimals: int = 0) -> str:
    """A rate; one that would round to nothing keeps its first digits."""
    return f"{value:.{decimals}f}" if value * 10.0**decimals >= 1.0 or not value else f"{value:.2g}"


def _clock(hours: float) -> str:
    minutes = round(hours * 60.0)
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _devices(count: int) -> str:
    return f"{count:,} device{'s' * (count != 1)}"


def _point(point: Mapping[str, Any]) -> str:
    pools = " + ".join(
        f"{p['replicas']} x "
        + (" ".join(f"{n} {v}" for n, v in p["mesh"].items() if v > 1 and n != "etp") or "1 device")
        for p in point["pools"]
    )
    return (
        f"{point['output_tokens_per_s_per_user']:.1f} tok/s per user, "
        f"{_few(point['output_tokens_per_s_per_device'])} per device: "
        f"{pools}"
    )


def _proof(result: ServeResult) -> list[str]:
    report = result.search
    lines = [f"exact under this model: {report.scored:,} of {report.candidates:,} candidates scored"]
    for title, gone in (("excluded by a bound", report.excluded_by_bound), ("rejected", report.rejected)):
        most_first = sorted(((count, reason) for reason, count in gone.items() if count), reverse=True)
        if most_first:
            told = ", ".join(f"{count:,} {reason}" for count, reason in most_first)
            lines.append(f"{title}: {told}")
    return [*lines, *result.notes]


def _next(result: ServeResult, saved: str) -> list[str]:
    """Commands that go on from here; the export is of the first plan that the engine itself can run."""
    from planner.export.serving import find_serving_exporter, serving_problems
    from planner.export.serving.target import ServingTarget

    if result.best.mode == "ping_pong":  # no engine runs it
        return [f"planner explain {saved}", f"planner simulate {saved}"]
    engine = next((name for name in ("sglang", "trtllm") if result.best.stack.startswith(name)), "vllm")
    exporter, following = find_serving_exporter(engine), [f"planner explain {saved}"]
    for number, plan in enumerate(result.plans, 1):
        try:
            runs = not serving_problems(ServingTarget(plan), exporter)
        except (ExportError, SpecError):
            continue
        if runs:
            which = "" if number == 1 else f":{number}"
            return [*following, f"planner export {saved}{which} --to {engine} -o FOLDER"]
    return following
