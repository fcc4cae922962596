"""Constants of a device, a link or a stack by their path (``efficiency.matmul``): what they are, and the same with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from planner.calibration.robust_fit import Constant
from planner.specs.device import Sourced
from planner.specs.serving_stack import ServingSoftware
from planner.specs.stack import Stack

__all__ = ["changed", "constant_at", "constants_of"]

SpecT = TypeVar("SpecT")


def constant_at(spec: Any, path: str) -> float | None:
    """The number at a path; None where the spec has nothing there.

    >>> from planner.specs.device_file import load_device
    >>> constant_at(load_device("h100-sxm"), "scale_up.bytes_per_s")
    450000000000.0
    """
    for name in path.split("."):
        spec = spec.get(name) if isinstance(spec, Mapping) else getattr(spec, name, None)
        if spec is None:
            return None
    return float(spec)


def changed(spec: SpecT, values: Mapping[str, float]) -> SpecT:
    """The spec with other numbers at some paths; kinds and sources stay. What a stack says of one generation alone gives way.

    >>> from planner.specs.device_file import load_device
    >>> constant_at(changed(load_device("h100-sxm"), {"efficiency.matmul": 0.5}), "efficiency.matmul")
    0.5
    """
    inner: dict[str, dict[str, float]] = {}
    new: dict[str, Any] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            new[name] = _renumbered(_get(spec, name), value)
    for name, part in inner.items():
        new[name] = changed(_get(spec, name), part)
    if isinstance(spec, Stack | ServingSoftware):
        new["on"] = {
            generation: {name: constant for name, constant in constants.items() if name not in values}
            for generation, constants in spec.on.items()
        }
    if isinstance(spec, Mapping):
        return {**spec, **new}  # type: ignore[return-value]
    return replace(spec, **new)  # type: ignore[type-var]


def constants_of(spec: Any, bounds: Sequence[tuple[str, float, float]]) -> list[Constant]:
    """Constants to fit: those of ``bounds`` (path, least, most) that the spec has, their priors inside the bounds."""
    found = []
    for path, low, high in bounds:
        value = constant_at(spec, path)
        if value is not None:
            found.append(Constant(path, min(max(value, low), high), low, high))
    return found


def _get(spec: Any, name: str) -> Any:
    return spec[name] if isinstance(spec, Mapping) else getattr(spec, name)


def _renumbered(old: Any, value: float) -> Any:
    return replace(old, value=value) if isinstance(old, Sourced) else value
