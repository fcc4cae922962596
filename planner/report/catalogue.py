"""The screens of what the planner knows: techniques, hardware and models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from planner.report.terminal import Screen, gib, words
from planner.specs.cluster import Cluster
from planner.specs.device import Device
from planner.specs.model import Model
from planner.specs.parameters import active_parameter_count, parameter_count
from planner.technique import SLOTS, Technique
from planner.units import GB, GIB, TB, counted, format_count

__all__ = ["show_cluster", "show_device", "show_hardware", "show_model", "show_models", "show_techniques"]

_MOST_RUNS = 8


def show_techniques(techniques: Sequence[Technique], everything: bool) -> None:
    """Prints the catalogue: modelled techniques by slot, then what is declared; with ``everything``, why it is not modelled."""
    screen = Screen()
    order = {slot: index for index, slot in enumerate(SLOTS)}
    modelled = [t for t in techniques if t.status == "modelled"]
    modelled.sort(key=lambda t: (order.get(t.slot or "", len(order)), t.key))
    if modelled:
        screen.line(f"{len(modelled)} modelled", "bold")
        marks = ["*" if any(figure.second_hand for figure in t.figures) else "" for t in modelled]
        rows = [
            (t.slot or t.kind, t.key, f"{len(t.figures)}{mark}")
            for t, mark in zip(modelled, marks, strict=True)
        ]
        tails = [" · ".join(part for part in (_what(t), t.source) if part) for t in modelled]
        screen.grid(
            ("slot", "key", "figures"), rows, ("slot", "key"), "choices of --fix SLOT=… · source", tails
        )
        if any(marks):
            screen.line("* from other authors' accounts of a source that could not be opened")
    declared = [t for t in techniques if t.status != "modelled"]
    if declared and everything:
        screen.line()
        screen.line(f"{len(declared)} declared and not modelled", "bold")
        why = [f"{t.summary} ({t.source})" for t in declared]
        screen.grid(("key", "kind"), [(t.key, t.kind) for t in declared], ("key", "kind"), "why not", why)
    elif declared:
        keys = ", ".join(t.key for t in declared)
        screen.section(f"{len(declared)} declared and not modelled (--all says why)", [keys])


def _what(technique: Technique) -> str:
    """The choices that it serves; of a preset, what it fixes."""
    return " ".join(technique.choices) or " ".join(f"{k}={v}" for k, v in technique.fixes.items())


def show_hardware(devices: Sequence[Device], clusters: Sequence[Cluster]) -> None:
    """Prints the shipped devices and clusters."""
    screen = Screen()
    screen.line(f"{len(devices)} devices (--cluster NAME:NODESxDEVICES_PER_NODE)", "bold")
    rows = [_device_row(device) for device in devices]
    headings = ("device", "year", "GiB", "TB/s", "TFLOP/s", "domain", "link GB/s", "nic GB/s")
    screen.grid(headings, rows, ("device",))
    screen.line()
    screen.line(f"{len(clusters)} clusters (--cluster NAME)", "bold")
    made_of = ["+".join(group.device.name for group in c.groups) for c in clusters]
    screen.grid(
        ("cluster", "devices"),
        [(c.name, f"{c.devices:,}") for c in clusters],
        ("cluster",),
        "device",
        made_of,
    )


def show_device(device: Device, numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints every number of a device with its kind and source."""
    screen = Screen()
    screen.line(
        f"{device.name} ({device.vendor}, {device.year}), sold in nodes of {device.devices_per_node}", "bold"
    )
    rows = [(name, _readable(name, number["value"]), number["kind"]) for name, number in numbers.items()]
    sources = [str(number["source"]) for number in numbers.values()]
    screen.grid(("key", "value", "kind"), rows, ("key", "kind"), "source", sources)
    screen.section("Notes", [device.notes] if device.notes else [])


def show_cluster(cluster: Cluster) -> None:
    """Prints a cluster's tiers and hosts."""
    screen = Screen()
    made_of = ", ".join(
        f"{g.nodes:,} node{'s' * (g.nodes > 1)} of {g.devices_per_node} × {g.device.name}"
        for g in cluster.groups
    )
    screen.line(f"{cluster.name}: {counted(cluster.devices, 'device')} ({made_of})", "bold")
    rows = [
        (
            t.name,
            f"{t.size:,}",
            f"{t.bytes_per_s / 1e9:.1f}",
            f"{t.effective_bytes_per_s / 1e9:.1f}",
            f"{t.latency_s * 1e6:.1f}",
            t.topology,
        )
        for t in cluster.tiers
    ]
    headings = ("tier", "devices", "GB/s", "reached", "latency µs", "topology")
    screen.grid(headings, rows, ("tier", "topology"), "source", [t.source for t in cluster.tiers])
    host = (
        f"host memory {gib(cluster.host_memory_bytes)} GiB at {cluster.host_memory_bytes_per_s / GB:.0f} GB/s"
    )
    link = f"link to it {cluster.host_link_bytes_per_s / GB:.0f} GB/s"
    nvme = f"NVMe {gib(cluster.nvme_bytes)} GiB at {cluster.nvme_bytes_per_s / GB:.1f} GB/s"
    cxl = (
        f", CXL memory {gib(cluster.cxl_bytes)} GiB at {cluster.cxl_bytes_per_s / GB:.0f} GB/s"
        if cluster.cxl_bytes
        else ""
    )
    screen.section("Per device", [f"{host}{cxl}, {link}, {nvme}"])
    screen.section("Notes", [cluster.notes] if cluster.notes else [])


def show_models(models: Sequence[Model]) -> None:
    """Prints the shipped models."""
    screen = Screen()
    screen.line(f"{len(models)} models (--model NAME)", "bold")
    rows = [
        (
            m.name, format_count(parameter_count(m)), format_count(active_parameter_count(m)),
            str(m.n_layers + sum(n for _, n in m.encoder_layers)), f"{m.hidden:,}", f"{m.vocab:,}", f"{m.max_seq_len:,}", m.arch,
        )
        for m in models
    ]  # fmt: skip
    headings = ("model", "parameters", "active", "layers", "hidden", "vocab", "context", "kind")
    screen.grid(headings, rows, ("model", "kind"))


def show_model(model: Model) -> None:
    """Prints a model's sizes, block by block."""
    screen = Screen()
    total, active = parameter_count(model), active_parameter_count(model)
    experts = f", {active:,} active" if active != total else ""
    screen.line(f"{model.name} ({model.family}, {model.arch}): {total:,} parameters{experts}", "bold")
    printed = model.published_parameters
    if printed:
        screen.line(f"published as {format_count(printed)}: {100 * (total / printed - 1):+.2f} %")
    tied = "tied" if model.tied_embeddings else "not tied"
    screen.line(f"hidden {model.hidden:,} · vocab {model.vocab:,} ({tied}) · context {model.max_seq_len:,}")
    for runs, what in ((model.encoder_layers, "Encoder"), (model.layers, "Layers")):
        screen.section(what, [_order(runs)] if runs else [])
    for name, block in model.blocks.items():
        screen.section(f"Block {name}", _parts(block))
    screen.section(
        "Notes",
        [f"{topic}: {text}" for topic, text in model.extras.items()]
        + ([model.exception] if model.exception else []),
    )
    screen.section("Source", [model.source] if model.source else [])


_UNITS = {"flop_per_s": "FLOP/s", "bytes_per_s": "B/s", "_bytes": "B", "_s": "s", "_w": "W"}
_PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
)


def _readable(key: str, value: float) -> str:
    """A number with a prefix and the unit that its key ends in; plain where it has none.

    >>> _readable("peak_flop_per_s.bf16", 9.894e14), _readable("launch_s", 2.8e-6), _readable("multiprocessors", 132.0)
    ('989.4 TFLOP/s', '2.8 µs', '132')
    """
    named = (suffix for part in reversed(key.split(".")) for suffix in _UNITS if part.endswith(suffix))
    suffix = next(named, None)
    if suffix is None or not value:
        return f"{value:.6g}"
    scale, prefix = next(((s, p) for s, p in _PREFIXES if value >= s), (1e-9, "n"))
    return f"{value / scale:.4g} {prefix}{_UNITS[suffix]}"


def _device_row(device: Device) -> tuple[str, ...]:
    numbers = (
        float(device.memory_bytes) / GIB,
        float(device.memory_bytes_per_s) / TB,
        float(device.peak_flop_per_s[_half(device)]) / 1e12,
        float(device.scale_up.bytes_per_s) / GB,
        float(device.nic_bytes_per_s) / GB,
    )
    told = [f"{number:.{digits}f}" for number, digits in zip(numbers, (1, 2, 0, 0, 1), strict=True)]
    return (device.name, str(device.year), *told[:3], str(device.scale_up.domain), *told[3:])


def _order(runs: Sequence[tuple[str, int]]) -> str:
    """Runs of equal layers; only their counts where there are many."""
    if len(runs) <= _MOST_RUNS:
        return ", ".join(f"{repeat} {name}" for name, repeat in runs)
    counts: Counter[str] = Counter()
    for name, repeat in runs:
        counts[name] += repeat
    return f"{', '.join(f'{n} {name}' for name, n in counts.items())}, in {len(runs)} runs"


def _parts(block: Any) -> list[str]:
    told = []
    for name in ("attention", "cross_attention", "ssm", "mlp", "moe"):
        part = getattr(block, name)
        if part is not None:
            told.append(f"{name}: {_sizes(part)}")
    return [*told, f"{block.norms} × {block.norm}" + (", parallel" if block.parallel else "")]


def _sizes(part: Any) -> str:
    """A part's fields, those at their defaults left out."""
    told = []
    for field in fields(part):
        value = getattr(part, field.name)
        if value is True and field.default is not True:
            told.append(words(field.name))
        elif not isinstance(value, bool) and (field.default is MISSING or value != field.default):
            told.append(f"{words(field.name)} {value:,}")
    return ", ".join(told)


def _half(device: Device) -> str:
    """The 16-bit format that the device multiplies in."""
    return (
        "bf16"
        if device.supports("bf16")
        else "fp16"
        if device.supports("fp16")
        else next(iter(device.peak_flop_per_s))
    )
