"""Elements that tensor parallelism sends per rank, per layer and micro-batch.

A GPT layer has an MLP of 4h; ``bsh`` elements in an activation of hidden width; 7bsh in the inputs of its
four matrix products, 9bsh in their outputs, 12h² in their weights.

Two-dimensional forms count what lies on the critical path: a block is broadcast along a binary tree of ``q``
ranks in ``log2 q`` sends, in ``q`` steps of ``1/q²`` of the tensor each.

Sources: D. Narayanan et al., arXiv:2104.04473, section 3.2 (1-D); Q. Xu et al., "Optimus", arXiv:2104.05343
(2-D); B. Wang et al., "Tesseract", arXiv:2105.14500 (2.5-D); Z. Bian et al., arXiv:2105.14450 (3-D). The last
three are counted here from the algorithms.
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = [
    "tensor_parallel_2d_elements",
    "tensor_parallel_3d_elements",
    "tensor_parallel_elements",
    "tesseract_elements",
]


def tensor_parallel_elements(batch: Real, seq: Real, hidden: Real, tp: Real, *, passes: Real = 2.0) -> Real:
    """Megatron's column-then-row split: ``4bsh(t−1)/t`` per pass, two all-reduces of ``bsh`` each.

    ``passes`` is 1 forward, 2 with the backward, 3 with full recomputation. With sequence parallelism every
    all-reduce becomes a reduce-scatter and an all-gather of the same volume.

    >>> tensor_parallel_elements(1, 1, 1, 8)  # 8bsh(t-1)/t
    7.0
    """
    return 4.0 * passes * batch * seq * hidden * (tp - 1) / tp


def tensor_parallel_2d_elements(batch: Real, seq: Real, hidden: Real, edge: Real) -> Real:
    """SUMMA on ``q × q`` ranks, forward: ``(7bsh + 12h²)·log2(q)/q``; backward twice that.

    >>> float(tensor_parallel_2d_elements(1, 2, 1, 8))  # bs = 2h, 64 ranks, in units of h²: 26 * 3/8
    9.75
    """
    return _inputs_and_weights(batch, seq, hidden) * (np.log2(edge) / edge)


def tesseract_elements(batch: Real, seq: Real, hidden: Real, edge: Real, depth: Real) -> Real:
    """``r`` layers of ``q × q`` ranks, weights in each, forward: ``(7bsh/r + 12h²)·log2(q)/q``.

    The backward sends twice that, and reduces the weight gradients over depth, ``2(r−1)/r · 12h²/q²``.

    >>> float(tesseract_elements(1, 2, 1, 4, 4))  # 64 ranks: (3.5 + 12) * 2/4
    7.75
    """
    return _inputs_and_weights(1.0 * batch / depth, seq, hidden) * (np.log2(edge) / edge)


def tensor_parallel_3d_elements(batch: Real, seq: Real, hidden: Real, edge: Real) -> Real:
    """``q × q × q`` ranks, forward: ``(16bsh + 12h²)(q−1)/q³``; backward the same again.

    Gathers of inputs and weights and a reduce-scatter of outputs, each along one axis.

    >>> tensor_parallel_3d_elements(1, 2, 1, 4)  # 64 ranks: 44 * 3/64
    2.0625
    """
    moved = _inputs_and_weights(batch, seq, hidden) + 9.0 * batch * seq * hidden
    return moved * (edge - 1) / (1.0 * edge * edge * edge)


def _inputs_and_weights(batch: Real, seq: Real, hidden: Real) -> Real:
    return 7.0 * batch * seq * hidden + 12.0 * hidden * hidden
