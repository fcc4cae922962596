"""Writes what was calibrated as profiles that the loaders read back: a device over its base, a cluster by tiers, a stack.

Every fitted number carries its origin in its source: by what, when, from how many rows of which files, its 95 % interval and the
error on rows that were left out.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from math import log
from typing import Any

from planner.calibration.robust_fit import Fit, Fitted
from planner.specs.cluster import Cluster, Tier
from planner.specs.device import Sourced, Transport
from planner.specs.device_file import find_device
from planner.specs.library import hardware_folder
from planner.specs.reader import read_file

__all__ = ["Provenance", "cluster_toml", "device_toml", "stack_toml"]

_NORMAL_95 = 1.96  # standard errors from the middle of a 95 % interval to its end


@dataclass(frozen=True, slots=True)
class Provenance:
    """What constants were fitted on.

    Attributes:
        files: names of the measurements' files.
        day: of the fit.
        conditions: what the measurements were taken with (device, library versions), where known.
    """

    files: tuple[str, ...]
    day: date
    conditions: str = ""

    def source(self, found: Fit, name: str) -> str:
        """The origin of one constant, in a line."""
        one = next(c for c in found.fitted if c.name == name)
        error = found.left_out or found.within
        how = "left out" if found.left_out else "in sample"
        conditions = f" ({self.conditions})" if self.conditions else ""
        return (
            f"planner calibrate, {self.day.isoformat()}: {one.rows} of {found.rows} rows of {', '.join(self.files)}{conditions}; "
            f"95 % {one.low:.3g} to {one.high:.3g}; error {how} {error.median:.1%} median, {error.p90:.1%} 90th percentile"
        )


def device_toml(base: str, name: str, fits: Sequence[Fit], provenance: Provenance) -> str:
    """The base's own file with the fitted constants in place of its numbers, under another name."""
    shipped = hardware_folder() / "devices" / f"{find_device(base)}.toml"
    table = read_file(base if base.endswith(".toml") else shipped)
    table["name"] = name
    for found in fits:
        for constant in found.fitted:
            inner, last = _place(table, constant.name.replace(".transport.", "."))
            inner[last] = _sourced(constant, provenance.source(found, constant.name))
    return _toml(table)


def cluster_toml(cluster: Cluster, name: str, found: Fit, provenance: Provenance) -> str:
    """The cluster with its tiers written out, the fitted constants with their origin and the others with theirs."""
    fitted = {c.name: _sourced(c, provenance.source(found, c.name)) for c in found.fitted}
    groups = [
        {"device": group.device.name, "nodes": group.nodes, "devices_per_node": group.devices_per_node}
        for group in cluster.groups
    ]
    tiers = [_tier(tier, fitted) for tier in cluster.tiers]
    notes = {"notes": cluster.notes} if cluster.notes else {}
    return _toml({"name": name, **notes, "group": groups, "tier": tiers})


def stack_toml(base: str, name: str, fits: Sequence[Fit], provenance: Provenance) -> str:
    """A stack that extends the base (or, where that is a file of the user's, repeats it) with the fitted constants."""
    table: dict[str, Any] = read_file(base) if base.endswith(".toml") else {"name": name, "extends": base}
    table["name"] = name
    for found in fits:
        for constant in found.fitted:
            inner, last = _place(table, constant.name)
            inner[last] = _sourced(constant, provenance.source(found, constant.name))
            for constants in inner.get("on", {}).values():
                constants.pop(last, None)  # of one generation: the fitted one holds on all
    return _toml(table)


def _place(table: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The inner table that a dotted name leads to, made where it is missing, and the key in it."""
    *path, last = name.split(".")
    for part in path:
        table = table.setdefault(part, {})
    return table, last


def _tier(tier: Tier, fitted: Mapping[str, Any]) -> dict[str, Any]:
    def number(key: str, value: float) -> dict[str, Any]:
        return fitted.get(f"{tier.name}.{key}") or {
            "value": value,
            "kind": "assumed",
            "source": tier.source or "base",
        }

    written: dict[str, Any] = {"name": tier.name, "size": tier.size, "topology": tier.topology}
    written["bytes_per_s"] = number("bytes_per_s", tier.bytes_per_s)
    written["latency_s"] = number("latency_s", tier.latency_s)
    written["efficiency"] = number("efficiency", tier.efficiency)
    if tier.oversubscription != 1.0:
        written["oversubscription"] = number("oversubscription", tier.oversubscription)
    for field in fields(Transport) if tier.transport is not None else ():
        constant: Sourced | None = getattr(tier.transport, field.name)
        if constant is not None:
            kept = {"value": constant.value, "kind": constant.kind, "source": constant.source}
            written[field.name] = fitted.get(f"{tier.name}.transport.{field.name}") or kept
    return written


def _sourced(constant: Fitted, source: str) -> dict[str, Any]:
    """The constant as a table; its spread is the standard error of its logarithm, by its 95 % interval."""
    known = {}
    if 0.0 < constant.low < constant.high:
        known = {"spread": float(f"{log(constant.high / constant.low) / (2.0 * _NORMAL_95):.2g}")}
    return {"value": float(f"{constant.value:.4g}"), "kind": "fitted", **known, "source": source}


# -- TOML --------------------------------------------------------------------------------------------------------------------


def _toml(table: Mapping[str, Any]) -> str:
    """Plain keys and numbers with their origin first, then tables, then lists of tables; the text reads back as the table."""
    text = _keys(table)
    for key, value in table.items():
        if _is_section(value):
            text += f"\n[{key}]\n{_keys(value)}"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            text += "".join(f"\n[[{key}]]\n{_keys(row)}" for row in value)
    assert tomllib.loads(text) == table, "what is written is what is read"
    return text


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) and "value" not in value


def _keys(table: Mapping[str, Any]) -> str:
    plain = (
        (key, value)
        for key, value in table.items()
        if not _is_section(value) and not (isinstance(value, list) and value and isinstance(value[0], dict))
    )
    return "".join(f"{key} = {_value(value)}\n" for key, value in plain)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(part)}" for key, part in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
