"""CUDA graphs: kernels recorded once and replayed, so that the host does not issue them one by one.

What it does: marks the kernels of the captured modules; the host spends nothing on them. ``full`` captures the whole iteration,
    ``attn``, ``router`` and ``mlp`` those modules of every layer.
Saves: host time per kernel, where the host and not the device sets the pace (small micro-batches, many small experts). A graph of
    the whole iteration cannot ask the host for the number of tokens per expert: experts' products are one kernel that reads it
    on the device, in place of one that the host issues per expert.
Costs: nothing here; static buffers of a graph are not counted.
Assumes: shapes that do not change between iterations (no dynamic number of tokens in a captured module).
Source: Megatron-Core ``--cuda-graph-impl`` and ``--cuda-graph-scope`` (megatron/core/transformer/cuda_graphs.py); experts under a
    graph: its user guide, MoE paged stash ("sync-free": ``--use-transformer-engine-op-fuser``, fused grouped experts).
"""

from __future__ import annotations

from planner.ledger import Item, Kernel, Ledger, Matmul
from planner.technique import Context, Figure, Knob, Technique
from planner.techniques import figures
from planner.techniques.figures import Pass

_MODULES = {
    "attn": frozenset({"qkv", "core_attn", "attn_output", "norm"}),
    "router": frozenset({"router"}),
    "mlp": frozenset({"mlp"}),
}
_CHOICES = ("full", "attn+router", "router", "mlp")


def apply(ledger: Ledger, ctx: Context) -> Ledger:
    """Marks the captured kernels."""
    scope = ctx.knobs["cuda_graph"]
    tags = None if scope == "full" else frozenset().union(*(_MODULES[name] for name in scope.split("+")))

    def capture(item: Kernel) -> Item | None:
        if tags is None and isinstance(item, Matmul) and item.grouped:
            return item.but(captured=True, single=True)
        return item.but(captured=True) if tags is None or item.tags & tags else None

    return ledger.edit(Kernel, capture)


def _captured(subject: Pass) -> float:
    """Kernels of a forward and backward pass that one graph launch replays, of all."""
    ledger, _ = figures.run("cuda_graph", subject, model="llama3-8b", cuda_graph="full")
    kernels = [item for item in ledger.of(Kernel) if item.phase in ("forward", "backward", "weight")]
    return sum(item.launches for item in kernels if item.captured) / sum(i.launches for i in kernels)


TECHNIQUE = Technique(
    key="cuda_graph",
    name="CUDA graphs",
    slot="cuda_graph",
    choices=_CHOICES,
    searched=False,
    asked=True,  # what it costs is not counted here, so that it would always win
    source="Megatron-Core --cuda-graph-impl",
    summary="Kernels recorded once and replayed without the host",
    knobs=(
        Knob(
            "cuda_graph",
            "which modules are captured, or whether every launch is waited for",
            ("none", *_CHOICES, "blocking"),
            "none",
        ),
    ),
    figures=(
        Figure(
            "kernels that one launch replays under full-iteration capture, of all",
            1.0,
            1e-9,
            "Megatron-Core user guide, CUDA graphs: the iteration is replayed by a single launch",
            _captured,
        ),
    ),
    apply=apply,
)
