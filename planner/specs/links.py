"""How a communication library drives a kind of link: read from ``hardware_profiles/links``, one file per kind.

A device's ``[scale_up]`` and ``[within_node]`` name their link (``link = "nvlink-4"``), and ``nic_link`` names that of its NICs;
what they say themselves takes precedence. A link of one's own may leave the name out: it then has a rate and a latency, and
collectives on it are priced by the textbook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import Problem, SpecError, did_you_mean
from planner.specs.device import Sourced, Transport
from planner.specs.library import hardware_folder
from planner.specs.reader import Reader, read_file
from planner.specs.sourced import read_optional, read_sourced

__all__ = ["Link", "link_table", "list_links", "load_link", "read_transport", "with_link"]


class Link(NamedTuple):
    """A shipped kind of link: a hop of a small message, the fraction of the rate that large ones reach, and the rest."""

    latency_s: Sourced
    efficiency: Sourced
    transport: Transport | None


def list_links() -> list[str]:
    """Names of the shipped links, sorted; no file is read."""
    return sorted(path.stem for path in (hardware_folder() / "links").glob("*.toml"))


def link_table(name: object, where: str) -> dict[str, Any]:
    """The table of a shipped link.

    Raises:
        SpecError: there is no such link.
    """
    folder = hardware_folder() / "links"
    if not isinstance(name, str) or not (folder / f"{Path(name).name}.toml").is_file():
        known = list_links()
        expected, hint = f"one of {', '.join(known)}", did_you_mean(str(name), known)
        raise SpecError(Problem(where, repr(name), expected, hint))
    return read_file(folder / f"{name}.toml")


@cache
def load_link(name: str) -> Link:
    """A shipped link by name.

    Raises:
        SpecError: there is no such link, or its file is wrong.

    >>> load_link("omni-path").efficiency.value
    0.405
    """
    reader = Reader(link_table(name, "link"), f"link {name}")
    link = Link(read_sourced(reader, "latency_s"), read_sourced(reader, "efficiency"), read_transport(reader))
    reader.finish()
    reader.raise_if_any()
    return link


def with_link(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table over what the link that it names says; as it is where it names none.

    Raises:
        SpecError: there is no such link.
    """
    if "link" not in table:
        return dict(table)
    return {**link_table(table["link"], f"{where}: link"), **table}


def read_transport(reader: Reader) -> Transport | None:
    """The transport in a link's table; None where it has none of its constants, or one that is incomplete (a problem)."""
    reader.ignore("link")
    if not any(reader.has(field.name) for field in fields(Transport)):
        return None
    found: dict[str, Any] = {
        field.name: read_sourced(reader, field.name)
        if field.type == Sourced.__name__
        else read_optional(reader, field.name)
        for field in fields(Transport)
    }
    return Transport(**found)
