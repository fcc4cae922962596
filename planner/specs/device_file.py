"""Device profiles: finds them by name, and reads a file over the defaults of its generation into a Device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError, did_you_mean
from planner.specs.device import Device, Efficiency, ScaleUp, Sourced
from planner.specs.library import canonical, hardware_folder, resolve
from planner.specs.links import link_table, read_transport, with_link
from planner.specs.power_limit import with_power_limit
from planner.specs.reader import Reader, read_file
from planner.specs.sourced import read_optional, read_sourced

__all__ = ["DTYPES", "TOPOLOGIES", "aliases", "find_device", "list_devices", "load_device", "merged_profile"]

DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8")
TOPOLOGIES = ("switch", "mesh", "torus", "host", "fabric")
_MAKERS = ("nvidia", "amd", "intel", "google", "huawei", "aws", "tesla", "instinct", "geforce", "quadro")


def list_devices() -> list[str]:
    """Names of the shipped device profiles, sorted; no file is read."""
    return sorted(path.stem for path in (hardware_folder() / "devices").glob("*.toml"))


def load_device(name_or_path: str | Path) -> Device:
    """A shipped device by name or alias in any case, or a profile of your own by path (``.toml``).

    Raises:
        SpecError: no such device, or the file is wrong (all of its problems at once).

    >>> load_device("H100").peak_flop_per_s["bf16"].value
    989400000000000.0
    """
    path = _profile_path(str(name_or_path))
    table = read_file(path)
    reader = Reader(_merged(table, path), str(path))
    limit: Reader | None = reader.table("power_limit", None)
    rule = None if limit is None else _power_limit(limit)
    device = _device(reader)
    reader.raise_if_any()
    return device if rule is None else with_power_limit(device, *rule, table.get("efficiency", {}))


def find_device(name: str) -> str | None:
    """The shipped profile that a name or alias means; a leading maker or product line is ignored."""
    spelled = canonical(name)
    known = list_devices()
    while True:
        found = resolve(spelled, known, {} if spelled in known else aliases("devices"))
        maker, _, rest = spelled.partition("-")
        if found is not None or maker not in _MAKERS or not rest:
            return found
        spelled = rest


@cache
def aliases(section: str) -> Mapping[str, str]:
    """The shipped aliases of ``devices`` or ``clusters``."""
    table: Mapping[str, str] = read_file(hardware_folder() / "ALIASES.toml")[section]
    return table


def merged_profile(path: Path) -> dict[str, Any]:
    """The table of a device file over the defaults of the generation and of the links that it names.

    Raises:
        SpecError: the file is unreadable, or names no known generation or link.
    """
    return _merged(read_file(path), path)


def _merged(table: dict[str, Any], path: Path) -> dict[str, Any]:
    merged = _over_generation(table, path)
    for key in ("scale_up", "within_node", "bridge"):
        if isinstance(merged.get(key), dict):
            merged[key] = with_link(merged[key], f"{path}: {key}")
    if "nic_link" in merged:
        nic = link_table(merged["nic_link"], f"{path}: nic_link")
        shared = {f"nic_{key}": nic.pop(key) for key in ("latency_s", "efficiency")}
        merged = {"nic_transport": nic, **shared, **merged}
    return merged


def _over_generation(table: dict[str, Any], path: Path) -> dict[str, Any]:
    generation = table.get("generation")
    folder = hardware_folder() / "generations"
    known = sorted(file.stem for file in folder.glob("*.toml"))
    if generation is None:
        if "efficiency" in table:
            return table
        hint = "A generation has what a data sheet does not tell; without one, the file needs an [efficiency] of its own."
        raise SpecError(Problem(f"{path}: generation", "is missing", f"one of {', '.join(known)}", hint))
    if not isinstance(generation, str) or Path(generation).name not in known:
        expected, hint = f"one of {', '.join(known)}", did_you_mean(str(generation), known)
        raise SpecError(Problem(f"{path}: generation", repr(generation), expected, hint))
    defaults = read_file(folder / f"{generation}.toml")
    merged = {**defaults, **table}
    for section in ("efficiency", "power_limit"):
        if isinstance(table.get(section), dict):
            merged[section] = {**defaults.get(section, {}), **table[section]}
    return merged


def _profile_path(name: str) -> Path:
    if name.endswith((".toml", ".json")):
        return Path(name)
    found = find_device(name)
    if found is None:
        hint = did_you_mean(canonical(name), [*list_devices(), *aliases("devices")])
        raise SpecError(
            Problem("device", f"unknown device {name!r}", "a shipped device or a .toml file", hint)
        )
    return hardware_folder() / "devices" / f"{found}.toml"


def _device(reader: Reader) -> Device:
    # Every field that holds a sourced number is read by its name; the few others are read one by one.
    numbers: dict[str, Any] = {
        field.name: read_sourced(reader, field.name)
        for field in fields(Device)
        if field.type == Sourced.__name__
    }
    within_node: Reader | None = reader.table("within_node", None)
    bridge: Reader | None = reader.table("bridge", None)
    nic: Reader | None = reader.table("nic_transport", None)
    reader.ignore("nic_link")
    device = Device(
        name=reader.text("name"),
        vendor=reader.text("vendor", ""),
        year=reader.integer("year", 0, minimum=1990, maximum=2100),
        peak_flop_per_s=_peaks(reader.table("peak_flop_per_s")),
        efficiency=_efficiency(reader.table("efficiency")),
        scale_up=_scale_up(reader.table("scale_up")),
        devices_per_node=reader.integer("devices_per_node", maximum=1024),
        usd_per_hour=read_optional(reader, "usd_per_hour", maximum=1e4),
        notes=reader.text("notes", ""),
        generation=reader.text("generation", ""),
        within_node=None if within_node is None else _scale_up(within_node),
        bridge=None if bridge is None else _scale_up(bridge),
        nic_transport=None if nic is None else read_transport(nic),
        **numbers,
    )
    if device.nic_efficiency.value > 1:
        reader.problem("nic_efficiency", f"{device.nic_efficiency.value:g}", "a fraction up to 1")
    if nic is not None:
        nic.finish()
    _check_only(reader)
    reader.finish()
    return device


def _check_only(reader: Reader) -> None:
    """What the sanity checks alone use is held against its form."""
    read_optional(reader, "matrix_to_vector")
    unusual: Reader | None = reader.table("unusual", None)
    if unusual is not None:
        for check in unusual.data:
            unusual.text(check)


def _peaks(reader: Reader) -> dict[str, Sourced]:
    peaks = {dtype: read_sourced(reader, dtype) for dtype in DTYPES if reader.has(dtype)}
    if not peaks and not reader.problems:
        reader.problem("bf16", "no dtype has a rate", f"at least one of {', '.join(DTYPES)}")
    reader.ignore(*DTYPES)
    reader.finish()
    return peaks


def _efficiency(reader: Reader) -> Efficiency:
    values = {
        field.name: read_sourced(reader, field.name, maximum=_ABOVE_ONE.get(field.name, 1.0))
        for field in fields(Efficiency)
    }
    reader.finish()
    return Efficiency(**values)


_ABOVE_ONE = {
    "matmul_tile": 4096, "matmul_burst": 10, "l2_speedup": 20, "softmax_flop": 200, "attention_tile": 4096,
    "attention_straggler": 10,
}  # fmt: skip


def _power_limit(reader: Reader) -> tuple[float, float]:
    """Energy per operation of the measured part, and the exponent of its generation."""
    rule = (
        read_sourced(reader, "joules_per_flop", maximum=1e-9),
        read_sourced(reader, "exponent", maximum=1.0),
    )
    reader.finish()
    return float(rule[0]), float(rule[1])


def _scale_up(reader: Reader) -> ScaleUp:
    scale_up = ScaleUp(
        kind=reader.text("kind"),
        domain=reader.integer("domain", maximum=10**7),
        bytes_per_s=read_sourced(reader, "bytes_per_s"),
        latency_s=read_sourced(reader, "latency_s", maximum=1.0),
        topology=reader.text("topology", choices=TOPOLOGIES),
        efficiency=read_sourced(reader, "efficiency", maximum=1.0),
        transport=read_transport(reader),
    )
    reader.finish()
    return scale_up
