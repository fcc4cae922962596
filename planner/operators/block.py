"""A layer: mixers and feed-forward networks, the norms before and after them, and the residual additions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from planner.operators.attention import attention
from planner.operators.feed_forward import mlp, moe
from planner.operators.graph import Graph
from planner.operators.state_space import state_space
from planner.specs.model import Block

__all__ = ["block"]


class _Branch(NamedTuple):
    """What one residual addition adds. ``parts`` read one norm; each is told whether it is the one that keeps its output."""

    norm: str
    add: str
    made_in: str  # the recompute region of the branch's output
    parts: tuple[Callable[[bool], None], ...]


def block(graph: Graph, spec: Block) -> None:
    """Emits a layer.

    Its norms stand before one branch after the other; if there are more norms than branches, the others stand behind them
    (Gemma 2, arXiv:2408.00118 §2). Branches of a parallel block all read the block's input, and without a norm of their own
    the output of the first branch's.
    """
    branches = _branches(graph, spec)
    for index, branch in enumerate(branches):
        has_norm = index < spec.norms
        if has_norm:
            kept = ("input",) if index == 0 else () if spec.parallel else ("residual",)
            graph.norm(branch.norm, spec.norm, *kept)
        keeps_input = has_norm or not spec.parallel
        for part in branch.parts:
            part(keeps_input)
            keeps_input = False
        if len(branches) + index < spec.norms:
            graph.norm(f"{branch.norm}_post", spec.norm, branch.made_in)
        if not spec.parallel or index == len(branches) - 1:
            graph.add(branch.add)
    for index in range(2 * len(branches), spec.norms):
        graph.norm(f"norm_extra{index}", spec.norm, "residual")
    graph.gradient("residual", graph.residual)
    if spec.extra_parameters:
        graph.weight(f"{spec.extra_parameters}")


def _branches(graph: Graph, spec: Block) -> list[_Branch]:
    """Attention and a state-space mixer side by side, cross-attention, networks one after the other."""
    mixers: list[Callable[[bool], None]] = []
    if spec.attention is not None:
        mixers.append(partial(attention, graph, spec.attention, "attention"))
    if spec.ssm is not None:
        mixers.append(partial(state_space, graph, spec.ssm))
    found = [_Branch("norm1", "mixer", "residual", tuple(mixers))] if mixers else []
    if spec.cross_attention is not None:
        cross = partial(attention, graph, spec.cross_attention, "cross")
        found.append(_Branch("norm_cross" if found else "norm1", "mixer", "residual", (cross,)))
    if spec.mlp is not None:
        network = partial(mlp, graph, spec.mlp, "mlp", "ffn")
        found.append(_Branch("norm2" if found else "norm1", "mlp", "mlp", (network,)))
    if spec.moe is not None:
        name = "norm3" if spec.mlp is not None else "norm2" if found else "norm1"
        found.append(_Branch(name, "mlp", "moe", (partial(moe, graph, spec.moe),)))
    return found
