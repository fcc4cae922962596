"""Text from the command line as values: numbers, names and files, with faults collected instead of raised one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from planner.errors import Problem as Fault
from planner.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from planner.specs.cluster import Cluster
    from planner.specs.model import Model
    from planner.specs.problem import Problem
    from planner.specs.stack import Stack
    from planner.specs.workload import TrainWorkload
    from planner.technique import Launcher

__all__ = [
    "attempt",
    "check_objective",
    "check_optimizer",
    "make_problem",
    "make_workload",
    "optional_milliseconds",
    "optional_number",
    "optional_quantity",
    "optional_whole",
    "parse_fixed",
    "raise_if_any",
    "read_cluster",
    "read_launcher",
    "read_list",
    "read_model",
    "read_preset",
    "read_reserve",
    "read_risk",
    "read_stack",
    "read_top",
    "whole_number",
]

T = TypeVar("T")
_MOST_PLANS = 1000


def parse_fixed(pairs: Sequence[str]) -> dict[str, str]:
    """``["tp=8"]`` as a mapping.

    Raises:
        SpecError: a pair without ``=``, or two values for one knob.

    >>> parse_fixed(["tp=8", "recompute=none"])
    {'tp': '8', 'recompute': 'none'}
    """
    faults: list[Fault] = []
    fixed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            faults.append(Fault("--fix", repr(pair), "KNOB=VALUE, such as tp=8"))
        elif fixed.setdefault(name, value) != value:
            faults.append(Fault(f"--fix {name}", f"{fixed[name]!r} and {value!r}", "one value per knob"))
    if faults:
        raise SpecError(faults)
    return fixed


def whole_number(flag: str, text: str) -> int:
    """The whole number that an option holds.

    Raises:
        SpecError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise SpecError(Fault(flag, repr(text[:40]), "a whole number")) from None


def read_top(text: str) -> int:
    """How many plans ``--top`` lists.

    Raises:
        SpecError: it is no such number.
    """
    wanted = whole_number("--top", text)
    if not 1 <= wanted <= _MOST_PLANS:
        raise SpecError(Fault("--top", text, f"a whole number from 1 to {_MOST_PLANS}"))
    return wanted


def attempt(
    faults: list[Fault],
    make: Callable[..., T],
    *values: Any,
    flags: Mapping[str, str] | None = None,
    **named: Any,
) -> T | None:
    """What ``make`` returns; its faults are noted, under the flags that their fields are set with."""
    try:
        return make(*values, **named)
    except SpecError as error:
        faults += [p._replace(where=(flags or {}).get(p.where, p.where)) for p in error.problems]
        return None


def raise_if_any(faults: list[Fault]) -> None:
    """Raises all noted faults, each once."""
    if faults:
        raise SpecError(dict.fromkeys(faults))


def read_model(text: str | None) -> Model:
    """The model, named so that the plan can be priced again."""
    from planner.specs.models import load_model

    if text is None:
        raise SpecError(Fault("--model", "is missing", "a model, such as llama3.1-70b"))
    model = load_model(text)
    return replace(model, name=_as_given(text, model.name))


def read_cluster(text: str) -> Cluster:
    """The cluster, named so that the plan can be priced again."""
    from planner.specs.cluster_file import load_cluster

    cluster = load_cluster(text)
    return replace(cluster, name=_as_given(text, cluster.name))


def read_stack(text: str) -> Stack:
    """The software stack, named so that the plan can be priced again."""
    from planner.specs.stack import load_stack

    stack = load_stack(text)
    return replace(stack, name=_as_given(text, stack.name))


def read_preset(name: str | None) -> dict[str, str]:
    """What every plan of a published combination has, as ``--fix`` takes it.

    Raises:
        SpecError: there is no such combination.

    >>> read_preset("ptdp")["tp"]
    '8'
    """
    if name is None:
        return {}
    from planner.technique import discover

    known = {t.key: t for t in discover("training").values() if t.kind == "preset"}
    if name not in known:
        expected = f"one of {', '.join(sorted(known))}"
        raise SpecError(Fault("--preset", repr(name[:40]), expected, did_you_mean(name, known)))
    return {knob: str(value) for knob, value in known[name].fixes.items()}


def read_launcher(name: str | None) -> Launcher | None:
    """What the named launcher can run."""
    if name is None:
        return None
    from planner.export.launchers import launcher

    return launcher(name)


def make_workload(**values: Any) -> TrainWorkload:
    """The job with these fields."""
    from planner.specs.workload import TrainWorkload

    return TrainWorkload(**values)


def make_problem(**values: Any) -> Problem:
    """The problem with these fields."""
    from planner.specs.problem import Problem

    return Problem(**values)


def optional_whole(faults: list[Fault], flag: str, text: str | None) -> int | None:
    """A whole number where the option is given; a fault is noted."""
    return None if text is None else attempt(faults, whole_number, flag, text)


def optional_number(faults: list[Fault], flag: str, text: str | None) -> float | None:
    """A finite number where the option is given; a fault is noted."""

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(number)
        return value

    return optional_quantity(faults, flag, text, finite, "a number")


def optional_milliseconds(faults: list[Fault], flag: str, text: str | None) -> float | None:
    """A limit of so many milliseconds, in seconds, where the option is given; a fault is noted."""
    number = optional_number(faults, flag, text)
    if number is not None and not number > 0.0:
        faults.append(Fault(flag, str(text), "milliseconds above 0"))
        return None
    return None if number is None else number * 1e-3


def optional_quantity(
    faults: list[Fault], flag: str, text: str | None, parse: Callable[[str], float], expected: str = ""
) -> float | None:
    """What ``parse`` makes of the option where it is given; a fault is noted, and says what was expected."""
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        faults.append(Fault(flag, repr(text[:40]), expected or str(error).partition(" is not ")[2]))
        return None


def read_list(text: str) -> tuple[str, ...]:
    """Names between commas.

    >>> read_list("bf16, FP8")
    ('bf16', 'fp8')
    """
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def read_reserve(text: str | None, cluster: Cluster) -> float:
    """The fraction of device memory that ``5%`` or ``4GiB`` leaves free."""
    from planner.units import format_bytes, parse_bytes

    if text is None:
        return 0.0
    try:
        if text.strip().endswith("%"):
            fraction = float(text.strip()[:-1]) / 100.0
        elif text.strip()[-1:].isalpha():
            fraction = parse_bytes(text) / float(cluster.device.memory_bytes)
        else:
            fraction = float(text) if float(text) == 0.0 else float("nan")
    except ValueError:
        fraction = float("nan")
    if not 0.0 <= fraction < 1.0:
        memory = format_bytes(float(cluster.device.memory_bytes))
        raise SpecError(
            Fault("--reserve", repr(text[:40]), f"a share such as 5%, or a size such as 4GiB, below {memory}")
        )
    return fraction


def read_risk(text: str | None) -> float:
    """The largest chance of running out of memory, from ``5%`` or ``0.05``; what is searched with by default where none is given.

    >>> read_risk("5%"), read_risk("0.05"), read_risk(None)
    (0.05, 0.05, 0.1)
    """
    from planner.specs.problem import MAX_OOM_RISK

    if text is None:
        return MAX_OOM_RISK
    number = text.strip().removesuffix("%")
    try:
        chance = float(number) / (100.0 if text.strip().endswith("%") else 1.0)
    except ValueError:
        chance = float("nan")
    if not 0.0 < chance <= 1.0:
        raise SpecError(
            Fault("--max-oom-risk", repr(text[:40]), "a chance such as 5% or 0.05; 100% is no limit")
        )
    return chance


def check_optimizer(name: str) -> None:
    """Raises a SpecError where no technique serves the optimizer."""
    from planner.technique import discover

    known = sorted(
        choice
        for t in discover("training").values()
        if t.slot == "optimizer" and t.status == "modelled"
        for choice in t.choices
    )
    if name not in known:
        raise SpecError(
            Fault("--optimizer", repr(name[:40]), f"one of {', '.join(known)}", did_you_mean(name, known))
        )


def check_objective(name: str) -> None:
    """Raises a SpecError where a ranking by this is unknown."""
    from planner.specs.problem import OBJECTIVES

    if name not in OBJECTIVES:
        hint = did_you_mean(name, OBJECTIVES)
        raise SpecError(Fault("--objective", repr(name[:40]), f"one of {', '.join(OBJECTIVES)}", hint))


def _as_given(text: str | None, name: str) -> str:
    """What to call a specification so that it can be loaded again: a file by its path, all else by its own name."""
    given = text or ""
    return given if ".toml" in given or given.endswith(".json") or Path(given).exists() else name
