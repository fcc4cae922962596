"""A schedule's own rules as composition rules: what its order accepts, over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from planner.schedule.order import Generator
from planner.technique import Check, Context

__all__ = ["accepts"]


def accepts(generator: Generator) -> Callable[[Context], Iterable[Check]]:
    """The checks of a technique whose order is ``generator``."""

    def valid(ctx: Context) -> Iterable[Check]:
        sizes = {"pp": ctx.mesh.pp, "micro_batches": ctx.micro_batches}
        for rule in generator.rules:
            name = "micro-batches" if rule.where == "micro_batches" else rule.where
            holds = rule.holds(sizes["pp"], sizes["micro_batches"])
            yield Check(f"{generator.name} needs {name} {rule.expected}", holds)

    return valid
