"""A training problem that is small enough to try every plan of it: a model of some gigabytes, and few open choices."""

from __future__ import annotations

from planner.specs.hardware import load_cluster
from planner.specs.model import Attention, Block, Mlp, Model
from planner.specs.problem import Problem
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload

# What stays out: choices that multiply meshes, not strategies.
CLOSED = {
    "context": "p2p", "tensor_overlap": "none", "zero_group": "full", "cp": "1", "parameter_offload": "none",
    "optimizer_offload": "none",
}  # fmt: skip
ALL_OR_NOTHING = tuple(
    f"recompute={choice}"
    for choice in ("norm", "act", "norm+act", "selective", "mlp", "block", "norm+mla_up")
)
"""Forbids to recompute a part of a layer."""


def small_problem(
    cluster: str,
    layers: int,
    *,
    reserve: float = 0.0,
    batch: int = 8,
    forbidden: tuple[str, ...] = (),
    **fixed: str,
) -> Problem:
    """Layers of 2048 hidden units; ``fixed`` closes further choices."""
    block = Block(attention=Attention(16, 16, 128), mlp=Mlp(8192, gated=True))
    model = Model(
        name="small", family="small", arch="decoder", hidden=2048, vocab=32000, max_seq_len=4096, blocks={"decoder": block},
        layers=(("decoder", layers),), tied_embeddings=False, dropout=False,
    )  # fmt: skip
    return Problem(
        model, load_cluster(cluster), TrainWorkload(batch, 4096), load_stack(), fixed={**CLOSED, **fixed}, reserve=reserve,
        forbidden=forbidden,
    )  # fmt: skip
