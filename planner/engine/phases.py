"""Seconds of a block's phases: windows first, then the block's own serial order, and what runs beside it.

Traffic beside a block's backward (gathers of weights, reductions of gradients) hides behind all of it: input gradients, weight
gradients and, where the block is recomputed, that. So the three phases are priced together::

    backward = T(b + w) − w        recompute = T(b + w + r) − T(b + w)        weight = w

with ``b``, ``w`` and ``r`` their own work (the latter two no faster than the host issues it) and ``T(x)`` the window in which
``x`` seconds of work and the traffic share the device. A recomputation lengthens a backward by what it takes, or by less where
traffic waits for something to hide behind. Only the sum of the three is a time that a clock could take, and it never grows
with bandwidth. What is left of traffic after all of them counts as the backward's, so a faster weight gradient beside slow
traffic moves seconds to it.

What runs beside work slows it by the device memory, caches and multiprocessors that it takes, which go by bytes: traffic that
waits for a slow network slows work less per second than traffic inside a node does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from planner.costs.overlap import pipelined_s
from planner.ledger import Array, Axes, Item, Kernel, Ledger, Matmul, Stream
from planner.specs.stack import Stack

__all__ = [
    "Contended",
    "Lane",
    "Lanes",
    "dispatches",
    "lanes",
    "loose",
    "phase_s",
    "shares_backward",
    "together_s",
]

Contended: TypeAlias = Callable[[Item, Array], Array]
"""Of an item and its seconds: in how many of them it slows what runs beside it."""

_BACKWARD = ("backward", "weight", "recompute")
_SHORT = (
    "main",
    "regather",
)  # a gather of an input runs beside its own product, and is over before the phase is


class Lane(NamedTuple):
    """Seconds of a stream beside the main one, and in how many of them it slows that."""

    seconds: Array | float
    contended_s: Array | float


class Lanes(NamedTuple):
    """Seconds of a phase's streams, windows resolved.

    Attributes:
        main: the block's own serial order.
        others: what runs beside it, stream by stream.
        launches, waits: kernels that the host issues, and calls that it waits for.
    """

    main: Array | float
    others: tuple[Lane, ...] = ()
    launches: Array | float = 0.0
    waits: Array | float = 0.0


def lanes(
    items: Iterable[Item], prices: Iterable[Array], ledger: Ledger, contended: Contended, slowdown: float
) -> Lanes:
    """The streams of one phase of one block."""
    main: dict[str, Array] = {}  # by window
    beside: dict[str, dict[str, Lane]] = defaultdict(dict)
    launches: Array | float = 0.0
    waits: Array | float = 0.0
    for item, price in zip(items, prices, strict=True):
        if item.track == "main":
            main[item.window] = main[item.window] + price if item.window in main else price
        else:
            inside, slows_s = beside[item.window], contended(item, price)
            known = inside.get(item.track)
            inside[item.track] = (
                Lane(price, slows_s)
                if known is None
                else Lane(known.seconds + price, known.contended_s + slows_s)
            )
        if isinstance(item, Kernel) and not item.captured:
            launches = launches + dispatches(item, ledger.axes) * (
                price > 0
            )  # without work it is not launched
        if item.waited:
            waits = waits + dispatches(item, ledger.axes) * (price > 0)
    serial: Array | float = main.pop("", 0.0)
    others = beside.pop("", {})
    for window in dict.fromkeys((*main, *beside)):
        chunks = ledger.chunks.get(window, np.inf)
        serial = serial + together_s(
            main.get(window, 0.0), [*beside.get(window, {}).values()], slowdown, chunks
        )
    return Lanes(serial, tuple(others.values()), launches, waits)


def together_s(
    main: Array | float, others: Sequence[Lane], slowdown: float, chunks: Array | float = np.inf
) -> Array:
    """Seconds of a window of work and of streams beside it, in so many chunks that pass from one to the other.

    >>> float(together_s(4.0, [Lane(2.0, 2.0)], 1.5)), float(together_s(4.0, [Lane(2.0, 0.5)], 1.5))  # + 0.5 * 2 and * 0.5
    (5.0, 4.25)
    """
    contended_s: Any = others[0].contended_s if len(others) == 1 else sum(lane.contended_s for lane in others)
    streams = [main, *(lane.seconds for lane in others)]
    return np.asarray(pipelined_s(streams, chunks, slowdown, contended_s))


def shares_backward(parts: Mapping[tuple[str, str], list[Item]], block: str, phase: str) -> list[list[Item]]:
    """Items of the other phases that a phase of a block is priced with: those of its backward, where something runs beside it."""
    if phase not in ("backward", "recompute") or not loose(parts.get((block, "backward"), ())):
        return []
    before = _BACKWARD[:2] if phase == "recompute" else ("weight",)
    return [parts[block, other] for other in before if (block, other) in parts]


def loose(items: Iterable[Item]) -> bool:
    """Whether some of a phase's items run beside the block's own serial order, for longer than a product."""
    return any(item.track not in _SHORT and not item.window for item in items)


def phase_s(phase: str, own: Lanes, others: Sequence[Lanes], stack: Stack) -> Array:
    """Seconds of one phase of one block.

    Args:
        phase: its name.
        own: its streams.
        others: those of the phases that :func:`shares_backward` names.
        stack: what the host takes per kernel, and how much streams slow each other.
    """
    if others and phase == "recompute":
        backward, *rest = others
        paced_s = _paced_s(backward, [*rest, own], stack) - _paced_s(backward, rest, stack)
    else:
        paced_s = _paced_s(own, others, stack)
        for other in others:
            paced_s = paced_s - _paced_s(other, (), stack)
    return paced_s + own.waits * (float(stack.waited_dispatches) * float(stack.dispatch_s))


def _paced_s(first: Lanes, others: Sequence[Lanes], stack: Stack) -> Array:
    """Seconds of a phase and of others after it, which also hide what runs beside the first, on the device or for the host.

    The others count with what the host takes to issue their kernels: traffic goes on while the device waits for it.
    """
    work_s, issued_s = first.main, first.launches * float(stack.dispatch_s)
    for other in others:
        alone_s = _paced_s(other, (), stack)
        work_s, issued_s = work_s + alone_s, issued_s + alone_s
    paced_s: Array = np.maximum(together_s(work_s, first.others, stack.overlap_slowdown.value), issued_s)
    return paced_s


def dispatches(item: Item, axes: Axes) -> Array | float:
    """Kernels that the host issues for an item.

    A grouped product is one per expert, as Transformer Engine issues them; a serving engine's (in a kernel format) is one, as is
    one whose sizes stay on the device.
    """
    if isinstance(item, Stream) and item.calls is not None:
        return axes[item.calls]
    if isinstance(item, Matmul) and item.apart:
        each: Array = axes[item.groups] * item.launches
        return each
    return item.launches if isinstance(item, Kernel) else 1.0
