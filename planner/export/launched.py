"""What a launcher's configuration says, once it is read back: a job and the choices of a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.errors import Problem, SpecError
from planner.specs.model import Model
from planner.specs.reader import first_bytes

__all__ = [
    "LaunchedRun",
    "beside",
    "beside_or_here",
    "degrees",
    "ignored_note",
    "names_in",
    "read_json",
    "read_text",
]

_MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class LaunchedRun:
    """What a configuration says.

    Attributes:
        launcher: whose configuration it is; a key of :data:`planner.export.launchers.LAUNCHERS`.
        model: the architecture; None where the configuration does not describe it.
        workload: keyword arguments of :class:`~planner.specs.workload.TrainWorkload`.
        fixed: knobs of ``Problem.fixed``; what the configuration leaves open is not among them.
        devices: processes that it starts; None where it does not tell.
        notes: what was taken for granted, left out or ignored, one sentence each.
        wasteful: what costs time or memory for nothing, one sentence each.
        ignored: keys or flags that were not understood, or say nothing about time and memory.
        missing: knobs and fields of the workload without which nothing can be priced → what the configuration says instead.
        micro_batches: per pipeline and step, where the configuration names their number and not their size, or not the batch.
        layerwise: choices of every layer, as :class:`~planner.plans.plan.Plan` has them, where layers differ.
    """

    launcher: str
    model: Model | None
    workload: Mapping[str, Any]
    fixed: Mapping[str, Any]
    devices: int | None
    notes: tuple[str, ...] = field(default=())
    wasteful: tuple[str, ...] = field(default=())
    ignored: tuple[str, ...] = field(default=())
    missing: Mapping[str, str] = field(default_factory=dict)
    micro_batches: int | None = None
    layerwise: Mapping[str, Any] | None = None


def beside(folder: Path) -> str:
    """What to read of an exported folder instead of a launcher's file; empty where no plan lies there."""
    plan = folder / "plan.json"
    return f"planner explain {plan} reads the whole of what was exported." if plan.is_file() else ""


def beside_or_here(path: str | Path, named: str) -> Path:
    """The file that a configuration names: beside it, or else where the command was given."""
    file = Path(path).expanduser().parent / named
    return file if file.is_file() else Path(named)


def read_text(path: str | Path, expected: str) -> str:
    """The text of a configuration.

    Raises:
        SpecError: there is no such file, it is no text, is empty, or is larger than any configuration.
    """
    where, file = str(path), Path(path).expanduser()
    try:
        if file.is_dir():
            raise SpecError(Problem(where, "is a folder", expected, beside(file)))
        content = first_bytes(file, _MAX_BYTES)
        if len(content) > _MAX_BYTES:
            held = f"holds {max(file.stat().st_size, len(content)):,} bytes"
            raise SpecError(Problem(where, held, f"{expected}, under a mebibyte"))
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecError(Problem(where, "no such file", expected, "Check the path.")) from None
    except UnicodeDecodeError as error:
        raise SpecError(Problem(where, f"is not UTF-8 text ({error.reason})", expected)) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(Problem(where, f"cannot be read ({error})", expected)) from None
    if not text.strip():
        raise SpecError(Problem(where, "is empty", expected))
    return text


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """The object in a JSON configuration.

    Raises:
        SpecError: as :func:`read_text`, or the text is no JSON object.
    """
    import json

    text = read_text(path, expected)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(Problem(str(path), f"is not valid JSON ({error})", expected)) from None
    if not isinstance(data, dict):
        raise SpecError(Problem(str(path), f"holds a {type(data).__name__}", f"an object: {expected}"))
    return data


def degrees(fixed: dict[str, Any], devices: int | None, notes: list[str]) -> int | None:
    """Adds the data-parallel degree that the devices leave; the devices, or None where they do not divide."""
    used = fixed.get("tp", 1) * fixed.get("cp", 1) * fixed.get("pp", 1)
    if devices is None:
        notes.append("The number of devices is not known: the data-parallel degree is left open.")
    elif devices % used:
        notes.append(
            f"The {devices} devices that are started do not divide among tp · cp · pp = {used}: they are left open."
        )
        devices = None
    else:
        fixed["dp"] = devices // used
    return devices


def ignored_note(ignored: Collection[str]) -> list[str]:
    """The sentence that lists what was not understood; none where there is nothing."""
    return [f"Ignored: {', '.join(sorted(ignored))}."] if ignored else []


def names_in(text: str) -> frozenset[str]:
    """Names between blanks.

    >>> sorted(names_in("stage  overlap_comm"))
    ['overlap_comm', 'stage']
    """
    return frozenset(text.split())
