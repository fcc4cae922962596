"""Libraries of dispatch and combine kernels, as ``hardware_profiles/exchange_libraries.toml`` describes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from planner.specs.device import Sourced
from planner.specs.library import hardware_folder
from planner.specs.reader import Reader, read_file
from planner.specs.sourced import read_optional, read_sourced

__all__ = ["COPIES", "ExchangeKernel", "exchange_kernel", "exchange_libraries"]

COPIES = ("expert", "rank", "none")


class ExchangeKernel(NamedTuple):
    """One kernel of a library; the constants are those of :func:`planner.costs.expert_exchange.expert_exchange_s`.

    ``copies``: whether a token is sent once per expert, once per rank that holds any of its experts, or not at all.
    ``bytes_per_element`` includes scales. ``unit_bytes_per_s`` is None where the number of multiprocessors does not matter;
    ``remote_unit_bytes_per_s`` replaces it where some of them serve the network.
    """

    copies: str
    launches: Sourced
    link_fraction: Sourced
    bytes_per_element: Sourced
    unit_bytes_per_s: Sourced | None = None
    remote_unit_bytes_per_s: Sourced | None = None
    remote_s: Sourced | None = None


@cache
def exchange_libraries() -> Mapping[str, Mapping[str, ExchangeKernel]]:
    """Kernels by library and name.

    Raises:
        SpecError: the file is wrong.
    """
    path = hardware_folder() / "exchange_libraries.toml"
    reader = Reader(read_file(path), str(path))
    found = {}
    for library in reader.data:
        kernels: Reader = reader.table(library)
        found[library] = {name: _kernel(kernels.table(name)) for name in kernels.data}
    reader.raise_if_any()
    return found


def exchange_kernel(name: str) -> ExchangeKernel:
    """A kernel by ``library.kernel``."""
    library, _, kernel = name.partition(".")
    return exchange_libraries()[library][kernel]


def _kernel(reader: Reader) -> ExchangeKernel:
    kernel = ExchangeKernel(
        copies=reader.text("copies", choices=COPIES),
        launches=read_sourced(reader, "launches"),
        link_fraction=read_sourced(reader, "link_fraction"),
        bytes_per_element=read_sourced(reader, "bytes_per_element"),
        unit_bytes_per_s=read_optional(reader, "unit_bytes_per_s"),
        remote_unit_bytes_per_s=read_optional(reader, "remote_unit_bytes_per_s"),
        remote_s=read_optional(reader, "remote_s"),
    )
    reader.finish()
    return kernel
