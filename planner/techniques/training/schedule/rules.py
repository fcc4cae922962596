"""A schedule's own rules as composition rules: what its order accepts, and what it keeps, over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from planner.schedule.order import Generator
from planner.technique import Check, Context

__all__ = ["accepts"]

_SHARDED_WEIGHTS = ("3", "fsdp")


def accepts(generator: Generator, *, copies: bool = False) -> Callable[[Context], Iterable[Check]]:
    """The checks of a technique whose order is ``generator``.

    Args:
        generator: the order.
        copies: whether a device keeps several copies or versions of its weights. What ZeRO's third stage gathers for a use, it
            drops after it, and its shards are of one version: there is nothing to keep the others in.
    """

    def valid(ctx: Context) -> Iterable[Check]:
        sizes = {"pp": ctx.mesh.pp, "micro_batches": ctx.micro_batches}
        for rule in generator.rules:
            name = "micro-batches" if rule.where == "micro_batches" else rule.where
            holds = rule.holds(sizes["pp"], sizes["micro_batches"])
            yield Check(f"{generator.name} needs {name} {rule.expected}", holds)
        if copies:
            whole = ctx.knobs.get("zero_stage") not in _SHARDED_WEIGHTS
            reason = "several copies of the weights, which the schedule keeps, cannot be sharded (zero_stage 3, fsdp)"
            yield Check(reason, whole | (ctx.mesh.pp == 1))

    return valid
