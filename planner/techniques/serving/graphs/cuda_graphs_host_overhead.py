"""CUDA graphs: a captured iteration is launched once, an eager one kernel by kernel.

What it does: marks the kernels of iterations that only generate, in batches that were captured; the host issues none of them.
Saves: the host's time per kernel where it, and not the device, sets the pace.
Costs: memory of the captured graphs (in the stack's reserved bytes).
Assumes: iterations with prompt tokens, and batches above the largest captured one, run eagerly.
Source: vLLM ``cudagraph_capture_sizes``; Vellaisamy et al. 2025 (SKIP, arXiv:2504.11750).
"""

from __future__ import annotations

from planner.ledger import Item, Kernel, Ledger
from planner.technique import Figure, Knob, ServingContext, Technique
from planner.techniques.serving import runs
from planner.techniques.serving.runs import Pass


def apply(ledger: Ledger, ctx: ServingContext) -> Ledger:
    """Marks every kernel."""

    def capture(item: Kernel) -> Item | None:
        return item.but(captured=True)

    return ledger.edit(Kernel, capture)


def _captured(subject: Pass) -> float:
    """Kernels that the host does not issue, of all."""
    ledger = runs.run("graphs", subject, model="llama3.1-8b")
    kernels = ledger.of(Kernel)
    return sum(item.launches for item in kernels if item.captured) / sum(item.launches for item in kernels)


TECHNIQUE = Technique(
    key="cuda_graphs_host_overhead",
    name="CUDA graphs, async scheduling, SKIP/TKLQT",
    slot="graphs",
    job="serving",
    choices=("captured",),
    default=True,
    source="arXiv:2504.11750",
    summary="Generation replayed without the host",
    knobs=(Knob("graphs", "who launches kernels of a generating batch", ("captured",)),),
    figures=(
        Figure(
            "kernels of a captured iteration that one launch replays, of all",
            1.0,
            1e-9,
            "vLLM docs/design/cuda_graphs.md: a full graph replays the whole forward pass",
            _captured,
        ),
    ),
    apply=apply,
)
