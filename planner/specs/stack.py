"""A software stack: what the framework adds to the hardware's own time and memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from planner.specs.device import Sourced
from planner.specs.library import hardware_folder
from planner.specs.load import Reader, read_file
from planner.specs.sourced import read_sourced

__all__ = ["Stack", "load_stack"]


@dataclass(frozen=True, slots=True)
class Stack:
    """The constants of one training stack, each with its kind and source.

    Attributes:
        overlap_slowdown: κ, how much compute and communication stretch while they share the device (≥ 1).
        framework_bytes: context, libraries and workspaces of an idle process.
        communicator_bytes: buffers of one communicator, per group of more than one rank.
        fragmentation: what the caching allocator holds beyond what is live, as a fraction of activations and workspace.
        gradient_bucket_bytes: bytes that one gradient reduction carries.
    """

    name: str
    overlap_slowdown: Sourced
    framework_bytes: Sourced
    communicator_bytes: Sourced
    fragmentation: Sourced
    gradient_bucket_bytes: Sourced
    notes: str = ""


def load_stack(name_or_path: str | Path = "default") -> Stack:
    """A shipped stack by name, or a TOML file.

    Raises:
        SpecError: no such stack, or the file is wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = hardware_folder() / "stacks" / f"{path.name}.toml"
    reader = Reader(read_file(path), str(path))
    values = {
        field.name: read_sourced(reader, field.name)
        for field in fields(Stack)
        if field.name not in ("name", "notes")
    }
    stack = Stack(name=reader.text("name"), notes=reader.text("notes", ""), **values)
    reader.finish()
    reader.raise_if_any()
    return stack
