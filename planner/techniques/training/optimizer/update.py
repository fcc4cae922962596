"""What the optimizers share: moments and master weights held, the update's kernels, and where in the step they run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planner.costs.optimizer import operator_update_bytes, optimizer_state_bytes, optimizer_touched_bytes
from planner.costs.precision import dtype_bytes
from planner.ledger import Item, Kernel, Ledger, Resident, Stream, times
from planner.technique import Context
from planner.techniques import figures
from planner.techniques.figures import Pass
from planner.techniques.training.zero_stage.states import mesh_of, with_degrees

__all__ = ["state_bytes", "trained", "update", "update_in_backward"]


def trained(ledger: Ledger) -> list[Resident]:
    """The weights that are trained, of every block and mesh."""
    return [held for held in ledger.of(Resident, pool="parameters") if "frozen" not in held.tags]


def update(
    ledger: Ledger, ctx: Context, by: str, *, extra_bytes: float = 0.0, vectors: tuple[str, ...] = ()
) -> Ledger:
    """Adds moments, gradient clipping and update; narrows master weights where the optimizer keeps them narrow.

    Args:
        ledger: the ledger.
        ctx: its context; ``ctx.knobs["optimizer"]`` names the states.
        by: key of the technique.
        extra_bytes: traffic per parameter beyond states, gradients and weights.
        vectors: blocks that AdamW updates in its place.
    """
    name = ctx.knobs["optimizer"]
    gradient, weight = dtype_bytes(ctx.gradient_dtype), dtype_bytes(ctx.format.activation)
    moments = optimizer_state_bytes(name, master_bytes=0.0)
    master = optimizer_state_bytes(name) - moments if ctx.format.master else 0.0
    # Clipping reads all gradients for their norm, then scales them in place; loss scaling of fp16 is undone in place before.
    passes = 5.0 if ctx.format.activation == "fp16" else 3.0
    copied, wide = 0.0, dtype_bytes("fp32")
    if _made_bytes(ctx) and gradient < wide:
        # Gradients are copied to fp32 and zeroed; new master weights are read once more for the weights in use.
        copied = 2.0 * gradient + wide + (wide if master else 0.0)
        gradient = wide
    ledger = _masters(with_degrees(ledger, ctx), master, by)
    added: list[Item] = []
    for weights in trained(ledger):
        adam = weights.block in vectors
        own = optimizer_state_bytes("adamw", master_bytes=0.0) if adam else moments
        # Where weights are their own masters, they are read as well as written.
        touched = optimizer_touched_bytes(own + master, gradient, weight if master else 2 * weight)
        by_operator = operator_update_bytes("adamw" if adam else name)
        if ctx.stack.habits["updates"] == "operators" and by_operator is not None:
            touched = by_operator + weight
        n_bytes = {
            "update": float(touched) + (0.0 if adam else extra_bytes) + copied,
            "gradient_norm": passes * gradient,
        }
        added += [*_held(weights, ctx, own, by), *_kernels(weights, n_bytes, "step", by)]
    return ledger.add(added)


def update_in_backward(ledger: Ledger, ctx: Context, by: str, passes: float = 1.0) -> Ledger:
    """Updates every weight as soon as its gradient is there: of a block's gradients, only the largest tensor is ever held.

    ``passes``: how often the update reads the gradient.
    """
    width = dtype_bytes(ctx.format.activation)
    ledger = _masters(with_degrees(ledger, ctx), 0.0, by)
    added: list[Item] = []
    for weights in trained(ledger):
        largest = max(weights.size.split(" + "), key=lambda term: float(np.max(ledger.axes[term])))
        added.append(
            replace(
                weights, what=f"{weights.what}.gradient", by=by, pool="workspace", lifetime="block", size=largest,
                tags=(weights.tags - {"parameters"}) | {"gradient"}, bytes_per_element=width,
            )
        )  # fmt: skip
        added += _kernels(weights, {"update": (2.0 + passes) * width}, "weight", by)

    def dropped(item: Item) -> bool:
        held = isinstance(item, Resident) and item.pool == "gradients"
        return held or (isinstance(item, Kernel) and item.phase == "weight" and "gradients" in item.tags)

    return ledger.drop(dropped).add(added)


def _masters(ledger: Ledger, n_bytes: float, by: str) -> Ledger:
    """Master weights of that width; without any, none."""

    def narrow(item: Resident) -> Item | None:
        if item.pool != "optimizer" or item.bytes_per_element == n_bytes:
            return None
        return item.but(bytes_per_element=n_bytes, by=by)

    if not n_bytes:
        return ledger.drop(lambda item: isinstance(item, Resident) and item.pool == "optimizer")
    return ledger.edit(Resident, narrow)


def _made_bytes(ctx: Context) -> float:
    """Bytes per parameter that the stack's update makes of 16-bit gradients."""
    beside = ctx.stack.update_bytes_per_parameter
    return max(beside.value - dtype_bytes("fp32") * (ctx.gradient_dtype == "fp32"), 0.0) if beside else 0.0


def _held(weights: Resident, ctx: Context, moments: float, by: str) -> Iterator[Resident]:
    what, tags = weights.what.removesuffix("parameters"), (weights.tags - {"parameters"}) | {"optimizer"}
    if moments:
        states = replace(weights, what=f"{what}moments", pool="optimizer", tags=tags)
        yield replace(states, bytes_per_element=moments, by=by)
    made = _made_bytes(ctx)
    if made:
        size = times(weights.size, f"/zero_{mesh_of(weights)}")
        held = replace(weights, what=f"{what}update", tags=tags | {"update"}, size=size, pool="workspace")
        yield replace(held, bytes_per_element=made, lifetime="step", by=by)


def _kernels(weights: Resident, n_bytes: dict[str, float], phase: str, by: str) -> Iterator[Stream]:
    """Kernels over a rank's share of the weights, as many bytes per parameter as each moves."""
    what, tags = weights.what.removesuffix("parameters"), (weights.tags - {"parameters"}) | {"optimizer"}
    for kernel, moved in n_bytes.items():
        yield Stream(
            what=f"{what}{kernel}", block=weights.block, phase=phase, tags=tags | {"update", kernel}, by=by,
            size=times(weights.size, f"/zero_{mesh_of(weights)}"), bytes_per_element=float(moved),
        )  # fmt: skip


def state_bytes(subject: Pass, optimizer: str, *pools: str, precision: str = "bf16") -> float:
    """Bytes held per parameter of GPT-2 XL in some pools (all states unless given), for figures."""
    ledger, _ = figures.run("optimizer", subject, model="gpt2-xl", optimizer=optimizer, precision=precision)
    whole, _ = figures.run("optimizer", lambda ledger, ctx: ledger, model="gpt2-xl", precision=precision)
    return figures.held_bytes(ledger, *pools) / figures.parameters(whole)
