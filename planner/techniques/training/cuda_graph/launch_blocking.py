"""Blocking launches: the host waits for every kernel and every collective before it issues the next one.

What it does: ends the queue between host and device, so that both take turns; a tool for finding errors, which BigScience left on
    because it kept their large runs from hanging.
Saves: nothing.
Costs: a dispatch and a synchronisation for every kernel and collective (``waited_dispatches`` of the software stack).
Assumes: what happens once per step has few kernels.
Source: NVIDIA CUDA C++ programming guide, ``CUDA_LAUNCH_BLOCKING``; BigScience ``train/tr11-176B-ml/chronicles-prequel.md``.
"""

from __future__ import annotations

from planner.ledger import Collective, Item, Kernel, Ledger
from planner.technique import Context, Figure, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_KEY = "launch_blocking"


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Marks everything that runs on the device."""

    def wait(item: Item) -> Item | None:
        runs = isinstance(item, Kernel | Collective) and item.phase != "step"
        return item.but(waited=True) if runs else None

    return ledger.edit(Item, wait)


def _waited(subject: Pass) -> float:
    """Kernels of a forward and backward pass that the host waits for, of all."""
    ledger, _ = figures.run("cuda_graph", subject, model="gpt2-xl", seq=1024, cuda_graph="blocking")
    kernels = [item for item in ledger.of(Kernel) if item.phase != "step"]
    return sum(item.launches for item in kernels if item.waited) / sum(item.launches for item in kernels)


TECHNIQUE = Technique(
    key=_KEY,
    name="Blocking launches",
    slot="cuda_graph",
    choices=("blocking",),
    searched=False,
    asked=True,  # a tool for finding errors
    source="CUDA_LAUNCH_BLOCKING",
    summary="The host waits for every kernel before it issues the next",
    figures=(
        Figure(
            "kernels that the host waits for, of all",
            1.0,
            1e-9,
            "CUDA C++ programming guide: CUDA_LAUNCH_BLOCKING=1 disables asynchronous kernel launches",
            _waited,
        ),
    ),
    apply=apply,
)
