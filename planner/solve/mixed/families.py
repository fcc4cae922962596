"""What a launcher lets layers differ in, as problems that are searched one after the other: in each, all layers choose freely.

Layers of one plan keep one set of the launcher's rules (``families``), take their values of a slot from one of its sets
(``per_layer``), and where embedding and head share a flag (``alike_at_ends``), they have one of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from planner.errors import SpecError
from planner.solve.space import Space
from planner.specs.problem import Problem
from planner.technique import Check, Context, Launcher

__all__ = ["FREE", "Ends", "Family", "families"]

Rules = Callable[[Context], Iterable[Check]]


@dataclass(frozen=True, slots=True)
class Ends:
    """What embedding and head share: values by slot, and whether they are cut to the same degrees."""

    values: Mapping[str, str]
    alike: bool


FREE = Ends({}, alike=False)


@dataclass(frozen=True, slots=True)
class Family:
    """A problem whose layers may have any of its choices side by side, and what embedding and head share there."""

    problem: Problem
    ends: Ends


def families(problem: Problem) -> Iterator[Family]:
    """The problem itself without a launcher; otherwise every family that has choices left, each once."""
    launcher = problem.launcher
    if launcher is None:
        yield Family(problem, FREE)
        return
    seen: set[tuple[object, ...]] = set()
    shared = sorted(launcher.alike_at_ends & launcher.per_layer.keys())
    ends_alike = {"tp", "cp"} <= launcher.alike_at_ends
    sets = [
        dict(zip(launcher.per_layer, some, strict=True)) for some in product(*launcher.per_layer.values())
    ]
    for rules, mixed in product(launcher.families or (_none,), sets):
        narrow = replace(problem, launcher=_narrowed(launcher, rules, mixed))
        try:
            choices = Space(narrow).choices
        except SpecError:
            continue  # what is fixed is of another family
        values = {slot: tuple(choice.value for choice in choices[slot]) for slot in mixed}
        for at_ends in product(*(values[slot] for slot in shared)):
            key = (rules, *values.values(), at_ends)
            if key not in seen:
                seen.add(key)
                yield Family(narrow, Ends(dict(zip(shared, at_ends, strict=True)), ends_alike))


def _narrowed(launcher: Launcher, rules: Rules, mixed: Mapping[str, frozenset[str]]) -> Launcher:
    """The launcher with one set of rules, and one set of values where it has several."""

    def allows(slot: str, value: str) -> bool:
        return launcher.allows(slot, value) and (slot not in mixed or value in mixed[slot])

    def valid(ctx: Context) -> Iterable[Check]:
        yield from launcher.valid(ctx)
        yield from rules(ctx)

    return replace(launcher, allows=allows, valid=valid)


def _none(ctx: Context) -> Iterable[Check]:
    return ()
