"""Sanity checks of hardware profiles: physical plausibility, and a known source for every number.

The checks catch the errors that circulate in other tables: sparse peaks listed as dense, vector rates as
matrix rates, bits as bytes, both directions of a link as one, one part's memory under another's name. Where
hardware really is unusual, the profile says why under ``[unusual]``, by the name of the check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.specs.cluster_file import list_clusters, load_cluster
from planner.specs.device import KINDS, Device
from planner.specs.device_file import aliases, find_device, list_devices, load_device, merged_profile
from planner.specs.library import hardware_folder
from planner.specs.reader import read_file
from planner.units import GIB

__all__ = ["CHECKS", "check_device", "check_hardware"]

CHECKS = (
    "fp8", "tf32", "int8", "matrix", "ridge", "memory", "bandwidth", "link", "nic", "host_link", "power",
)  # fmt: skip
_TOLERANCE = 0.03  # printed peaks are rounded: Trainium2's 1299 / 667 TFLOP/s is 2.6 % below 2


def check_hardware(names: Sequence[str] | None = None) -> list[Problem]:
    """Problems of the named device profiles (names or files), or of all shipped hardware data.

    >>> check_hardware(["h100-sxm"])
    []
    """
    sources = read_file(hardware_folder() / "SOURCES.toml")
    if names is not None:
        return [problem for name in names for problem in _check_profile(name, sources)]
    problems = [problem for name in list_devices() for problem in _check_profile(name, sources)]
    problems += [problem for name in list_clusters() for problem in _check_cluster(name, sources)]
    for folder in ("generations", "links", "stacks"):
        for path in sorted((hardware_folder() / folder).glob("*.toml")):
            problems += _source_problems(read_file(path), sources, str(path))
    return [*problems, *_alias_problems(), *_source_entry_problems(sources)]


def check_device(
    device: Device, matrix_to_vector: float | None = None, unusual: Mapping[str, str] | None = None
) -> list[Problem]:
    """What is implausible about a device, apart from the checks that ``unusual`` explains.

    Args:
        device: the device.
        matrix_to_vector: dense 16-bit matrix FLOP per fp32 vector FLOP of its generation, where known.
        unusual: reasons by the name of the check (one of :data:`CHECKS`).
    """
    unusual = unusual or {}
    problems = [
        Problem(f"device {device.name!r}: {check}", found, expected)
        for check, found, expected in (*_peak_findings(device, matrix_to_vector), *_rate_findings(device))
        if check not in unusual
    ]
    problems += [
        Problem(f"device {device.name!r}: unusual.{check}", "no such check", f"one of {', '.join(CHECKS)}")
        for check in unusual
        if check not in CHECKS
    ]
    return problems


def _peak_findings(device: Device, matrix_to_vector: float | None) -> Iterator[tuple[str, str, str]]:
    """(check, found, expected) for each implausible peak."""
    peak = {dtype: number.value for dtype, number in device.peak_flop_per_s.items()}
    half = peak.get("bf16") or peak.get("fp16")
    if half is None:
        yield "matrix", "no 16-bit rate", "bf16 or fp16"
        return
    if "bf16" in peak and "fp16" in peak and peak["bf16"] != peak["fp16"]:
        yield "matrix", f"bf16 / fp16 = {peak['bf16'] / peak['fp16']:.3g}", "the same rate"
    ratios = {dtype: peak[dtype] / half for dtype in ("fp8", "tf32", "int8") if dtype in peak}
    if "fp8" in ratios and not _near(ratios["fp8"], 2.0):
        yield "fp8", f"fp8 / 16-bit = {ratios['fp8']:.3g}", "2 (is one of them the sparse figure?)"
    if "tf32" in ratios and not _near(ratios["tf32"], 0.5):
        yield "tf32", f"tf32 / 16-bit = {ratios['tf32']:.3g}", "1/2 (is one of them the sparse figure?)"
    if ratios.get("int8", 1.0) > 4.0 * (1 + _TOLERANCE):
        yield "int8", f"int8 / 16-bit = {ratios['int8']:.3g}", "at most 4"
    if matrix_to_vector is not None:
        ratio = half / device.vector_flop_per_s.value
        if not 2.0 * (1 - _TOLERANCE) <= ratio <= matrix_to_vector * (1 + _TOLERANCE):
            expected = f"2 to {matrix_to_vector:g} here (less: a vector rate; more: a sparse figure)"
            yield "matrix", f"16-bit / vector fp32 = {ratio:.3g}", expected
    ridge = half / device.memory_bytes_per_s.value
    if not 30 <= ridge <= 700:
        yield "ridge", f"ridge point {ridge:.3g} FLOP/byte", "30 to 700"


def _rate_findings(device: Device) -> Iterator[tuple[str, str, str]]:
    """(check, found, expected) for each implausible capacity, bandwidth or power."""
    gib = device.memory_bytes.value / GIB
    marketed = re.search(r"-(\d+)gb\b", device.name)
    if marketed and not 0.9 <= gib / float(marketed[1]) <= 1.01:
        yield "memory", f"{gib:.1f} GiB", f"about {marketed[1]} GiB, as the name says"
    link, nic = device.scale_up.bytes_per_s.value, device.nic_bytes_per_s.value
    for check, value, low, high, unit in (
        ("memory", gib, 4, 512, "GiB"),
        ("bandwidth", device.memory_bytes_per_s.value / 1e9, 100, 20_000, "GB/s"),
        ("link", link / 1e9, 5, 2000, "GB/s per direction"),
        ("nic", nic / 1e9, 0.1, 200, "GB/s per device and direction (are these bits?)"),
        ("host_link", device.host_link_bytes_per_s.value / 1e9, 3, 900, "GB/s per direction"),
        ("power", device.power_w.value, 30, 2500, "W"),
    ):
        if not low <= value <= high:
            yield check, f"{value:g} {unit.partition(' (')[0]}", f"{low:g} to {high:g} {unit}"
    if nic > link:
        yield "nic", f"{nic / 1e9:g} GB/s, faster than the scale-up link", f"at most {link / 1e9:g} GB/s"
    if device.scale_up.domain < device.devices_per_node and device.within_node is None:
        found = f"domains of {device.scale_up.domain} in nodes of {device.devices_per_node}"
        yield "link", found, "[within_node] to join them"


def _near(ratio: float, expected: float) -> bool:
    return abs(ratio / expected - 1) <= _TOLERANCE


def _check_profile(name: str, sources: Mapping[str, Any]) -> list[Problem]:
    try:
        device = load_device(name)
        shipped = find_device(name)
        path = Path(name) if shipped is None else hardware_folder() / "devices" / f"{shipped}.toml"
        table = merged_profile(path)
    except SpecError as error:
        return list(error.problems)
    ceiling = table.get("matrix_to_vector")
    ceiling = ceiling["value"] if isinstance(ceiling, dict) else ceiling
    problems = check_device(device, ceiling, table.get("unusual"))
    if shipped is not None and device.name != shipped:
        problems.append(Problem(f"{path}: name", repr(device.name), f"{shipped!r}, the name of the file"))
    return [*problems, *_source_problems(table, sources, str(path))]


def _check_cluster(name: str, sources: Mapping[str, Any]) -> list[Problem]:
    path = hardware_folder() / "clusters" / f"{name}.toml"
    try:
        cluster = load_cluster(name)
    except SpecError as error:
        return list(error.problems)
    problems = _source_problems(read_file(path), sources, str(path))
    if cluster.source not in sources:
        problems.append(Problem(f"{path}: source", repr(cluster.source), "a key of SOURCES.toml"))
    return problems


def _source_problems(table: Mapping[str, Any], sources: Mapping[str, Any], where: str) -> list[Problem]:
    """Numbers of a data file whose kind or source is unknown."""
    return [
        Problem(f"{where}: {path}.{key}", repr(number.get(key)), expected)
        for path, number in _numbers(table)
        for key, known, expected in (
            ("kind", KINDS, f"one of {', '.join(KINDS)}"),
            ("source", sources, "a key of SOURCES.toml"),
        )
        if number.get(key) not in known
    ]


def _numbers(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every sourced number of a table, with its key path."""
    for key, value in table.items():
        rows: Iterable[Any] = value if isinstance(value, list) else (value,)
        for row in rows:
            if isinstance(row, dict) and "value" in row:
                yield f"{path}{key}", row
            elif isinstance(row, dict):
                yield from _numbers(row, f"{path}{key}.")


def _alias_problems() -> list[Problem]:
    known = {"devices": list_devices(), "clusters": list_clusters()}
    return [
        Problem(f"ALIASES.toml: {section}.{alias}", repr(name), f"a shipped file of {section}")
        for section, names in known.items()
        for alias, name in aliases(section).items()
        if name not in names
    ]


def _source_entry_problems(sources: Mapping[str, Any]) -> list[Problem]:
    """Entries of SOURCES.toml that say too little or something unknown."""
    allowed = {"title", "url", "repository", "date", "note"}
    expected = "title and date, and perhaps url, repository, note"
    return [
        Problem(f"SOURCES.toml: {key}", f"has {', '.join(sorted(entry)) or 'nothing'}", expected)
        for key, entry in sources.items()
        if not {"title", "date"} <= set(entry) <= allowed
    ]
