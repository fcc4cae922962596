"""Answers of the solvers as tables: what was chosen, what it takes, and what is proved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from planner.report.terminal import Screen
from planner.units import format_bytes, format_count, format_seconds

__all__ = [
    "show_alignment",
    "show_balance",
    "show_dealt",
    "show_groups",
    "show_placement",
    "show_ranks",
    "show_schedules",
    "show_sharding",
]

_MOST_ROWS = 40


def show_sharding(content: Mapping[str, Any]) -> None:
    """Prints what every operator splits along every mesh axis; layers that are alike stand once."""
    screen = Screen()
    mesh = " × ".join(str(n) for n in content["mesh"])
    took = f"{format_seconds(content['time_s'])} forward and backward · {_of(content['memory_bytes'], content['budget_bytes'])}"
    screen.line(f"mesh {mesh} · {took}", "bold")
    screen.line()
    axes = [f"axis {i} ({n})" for i, n in enumerate(content["mesh"])]
    rows = [
        (
            name, *(split or "-" for split in operator["splits"]), format_seconds(operator["time_s"]),
            format_bytes(operator["memory_bytes"]),
        )
        for name, operator in _runs(content["operators"])
    ]  # fmt: skip
    screen.grid(("operator", *axes, "time", "memory"), rows, ("operator", *axes))
    changes: Counter[str] = Counter()
    for change in content["reshardings"]:
        changes[f"{_short(change['from'])} → {_short(change['to'])}"] += change["time_s"]
    told = [f"{where}: {format_seconds(seconds)}" for where, seconds in changes.most_common()]
    screen.section("Changes of layout, forward and back, all layers", told)
    show_proof(screen, content["certificate"], format_seconds)


def show_schedules(points: Sequence[Mapping[str, Any]], once_s: float) -> None:
    """Prints schedules, least recomputation first."""
    screen = Screen()
    screen.line(f"{format_seconds(once_s)} with nothing computed twice", "bold")
    screen.line()
    rows = [
        (
            format_seconds(p["recompute_s"]), f"{100.0 * p['recompute_s'] / once_s:.1f} %", format_bytes(p["kept_bytes"]),
            format_bytes(p["peak_bytes"]), p["certificate"]["status"],
        )
        for p in points
    ]  # fmt: skip
    again = [
        ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in p["computed_again"].items()) or "-"
        for p in points
    ]
    screen.grid(("recompute", "share", "kept", "peak", "proof"), rows, ("proof",), "computed again", again)
    show_proof(screen, points[-1]["certificate"], format_seconds)


def show_placement(content: Mapping[str, Any]) -> None:
    """Prints where tensors rest outside the first tier."""
    screen = Screen()
    screen.line(
        f"{format_seconds(content['time_s'])}, {format_seconds(content['kernels_s'])} of it kernels", "bold"
    )
    screen.line(" · ".join(f"{tier} {format_bytes(peak)}" for tier, peak in content["peak_bytes"].items()))
    screen.line()
    rests = content["rests"][:_MOST_ROWS]
    rows = [(r["tensor"], r["tier"], r["after"], r["before"], format_seconds(r["move_s"])) for r in rests]
    headings = ("tensor", "rests in", "after", "before", "moves")
    screen.grid(headings, rows, headings[:4])
    _left_out(screen, len(content["rests"]))
    show_proof(screen, content["certificate"], format_seconds)


def show_groups(content: Mapping[str, Any]) -> None:
    """Prints the groups and the sequences of each; groups that are alike stand once."""
    screen = Screen()
    count = len(content["groups"])
    screen.line(f"{format_seconds(content['time_s'])}, {count} group{'s' * (count != 1)}", "bold")
    screen.line()
    alike = Counter((g["degree"], tuple(g["sequences"]), g["time_s"]) for g in content["groups"])
    lengths = [format_count(length) for length in content["lengths"]]
    rows = [
        (str(count), str(degree), *(str(n) if n else "-" for n in sequences), format_seconds(seconds))
        for (degree, sequences, seconds), count in alike.items()
    ]
    screen.grid(("groups", "ranks", *lengths, "time"), rows)
    show_proof(screen, content["certificate"], format_seconds)


def show_dealt(content: Mapping[str, Any]) -> None:
    """Prints the groups beside a ranking, and what groups of one size take."""
    screen = Screen()
    screen.line()
    screen.line("Sequences in groups of unlike sizes (forward and backward alone)", "bold")
    if "refused" in content:
        screen.line(content["refused"])
        return
    equal = content["equal"]
    if equal is not None:
        ratio = equal["time_s"] / content["time_s"]
        told = f"{format_seconds(equal['time_s'])} in groups of {equal['degree']}, the best of one size: {ratio:.2f}×"
        screen.line(told if ratio > 1.0 else f"groups of {equal['degree']} for all are as fast")
    else:
        screen.line("no one size has room for all sequences")
    show_groups(content)


def show_micro_batches(content: Mapping[str, Any]) -> None:
    """Prints micro-batches; those that are alike stand once."""
    screen = Screen()
    padding = f"{content['padding_tokens']:,} tokens of padding"
    screen.line(f"{format_seconds(content['time_s'])} per pipeline stage and step, {padding}", "bold")
    screen.line()
    alike = Counter((m["sequences"], m["length"]) for m in content["micro_batches"])
    rows = [(str(count), str(n), f"{length:,}") for (n, length), count in alike.items()]
    screen.grid(("micro-batches", "sequences", "padded to"), rows)
    told = f"{format_seconds(content['step_s'])} per step under {content['schedule']}"
    screen.line(f"{told}, of which {format_seconds(content['bubble_s'])} idle")
    show_proof(screen, content["certificate"], format_seconds)


def show_balance(content: Mapping[str, Any]) -> None:
    """Prints the experts of every device."""
    screen = Screen()
    _devices(screen, content["device"], [format_count(load) for load in content["loads"]])
    show_proof(screen, content["certificate"], format_count)


def show_alignment(content: Mapping[str, Any]) -> None:
    """Prints the experts of every device, layer by layer, and how many tokens move."""
    screen = Screen()
    moved, total = content["moved"], content["total"]
    in_order = content["moved_in_order"]
    screen.line(
        f"{format_count(moved)} of {format_count(total)} tokens move, {format_count(in_order)} in the order of numbers",
        "bold",
    )
    for layer, device in enumerate(content["device"][:_MOST_ROWS]):
        placed = [" ".join(str(e) for e, d in enumerate(device) if d == k) for k in range(max(device) + 1)]
        screen.line(f"layer {layer}: {' | '.join(placed)}")
    _left_out(screen, len(content["device"]))
    show_proof(screen, content["certificate"], format_count)


def show_ranks(content: Mapping[str, Any]) -> None:
    """Prints the node of every rank."""
    screen = Screen()
    before = format_seconds(content["time_in_order_s"])
    screen.line(f"{format_seconds(content['time_s'])} of messages per step, {before} in order", "bold")
    screen.section("Node of rank 0, 1, …", [" ".join(str(node) for node in content["node"])])
    show_proof(screen, content["certificate"], format_seconds)


# -- details -----------------------------------------------------------------------------------------------------------------


def _runs(operators: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Operators by name; consecutive layers with the same choices stand as one."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for operator in operators:
        layers.setdefault(operator["name"].partition(".")[0], []).append(operator)
    found: list[tuple[str, Mapping[str, Any]]] = []
    names = list(layers)
    index = 0
    while index < len(names):
        last = index
        mine = [(_short(o["name"]), o["splits"]) for o in layers[names[index]]]
        while (
            last + 1 < len(names)
            and [(_short(o["name"]), o["splits"]) for o in layers[names[last + 1]]] == mine
        ):
            last += 1
        prefix = names[index] if last == index else f"{names[index]}-{names[last].removeprefix('layer')}"
        for operator in layers[names[index]]:
            rest = operator["name"].partition(".")[2]
            found.append((f"{prefix}.{rest}" if rest else prefix, operator))
        index = last + 1
    return found


def _short(name: str) -> str:
    """An operator's name without its layer."""
    return name.partition(".")[2] if name.startswith("layer") and "." in name else name


def _devices(screen: Screen, device: Sequence[int], loads: Sequence[str]) -> None:
    rows = [(str(k), load) for k, load in enumerate(loads)]
    experts = [" ".join(str(e) for e, d in enumerate(device) if d == k) or "-" for k in range(len(loads))]
    screen.grid(("device", "load"), rows, (), "experts", experts)


def _of(used: float, budget: float) -> str:
    return f"{format_bytes(used)} of {format_bytes(budget)}"


def _left_out(screen: Screen, rows: int) -> None:
    if rows > _MOST_ROWS:
        screen.line(f"… and {rows - _MOST_ROWS:,} more (--json has all)")


def show_proof(screen: Screen, certificate: Mapping[str, Any], unit: Any, *, largest: bool = False) -> None:
    """What is proved, by whom, and how long it took; of the ``largest`` of something, the certificate is of its negative."""
    if certificate["status"] == "exact":
        told = f"Exact under this model: {certificate['solver']}, {format_seconds(certificate['wall_s'])}."
    else:
        bound = f"above {unit(-certificate['bound'])}" if largest else f"below {unit(certificate['bound'])}"
        told = (
            f"Within {100.0 * certificate['gap']:.2g} % of the best: nothing is {bound} "
            f"({certificate['solver']}, {format_seconds(certificate['wall_s'])})."
        )
    notes = ", ".join(f"{number:,} {name}" for name, number in certificate["notes"].items())
    screen.section("How sure", [told, notes] if notes else [told])
