"""Work of a state-space layer's chunked scan: what the kernels that train it move and multiply.

The scan is cut into chunks (state-space duality). Inside a chunk the output is a product of scores, as in attention; between
chunks states are passed on. Every step is a kernel of its own that writes its result: the states of all chunks in fp32, the
scores of all groups in fp32. The backward keeps none of them and makes scores and states again.

Counted from state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py (``_mamba_chunk_scan_combined_fwd`` and ``_bwd``, gated),
which Megatron-Core, NeMo Automodel and Hugging Face run: tensors of sums and steps per head are left out, about 1 %. The
algorithm: T. Dao, A. Gu, arXiv:2405.21060, section 6.
"""

from __future__ import annotations

from typing import NamedTuple

from planner.costs.arrays import Real

__all__ = ["PRODUCT_SHARE", "ScanWork", "scan_work"]

PRODUCT_SHARE = 0.11
"""Of the dense 16-bit matrix rate, what the products of a chunk reach while no traffic hides behind them.

Measured, on top of the counted bytes at the rate of a stream, on two GPUs. H100, all scan and convolution kernels of a layer of
Nemotron 3 Nano in training (nsys): 1.124 ms per 4,096 tokens, 3.11 ms per 12,288, 11.25 ms per 32,768 with the forward run twice
(GiscardBiamby/Automodel-scalingai-f26, mfu/REPORT.md and the nsys_breakdown.md of its runs, 2026-09): off by -5, -1 and -9 %.
GB10, forward and backward of the scan alone, 16,384 tokens of 112 heads in chunks of 64, 128 and 256: 87.6, 63.6 and 57.0 ms
(DatasunriseOU/cppmega, docs/status, 2026-04-27): off by -9, -3 and +3 %."""


class ScanWork(NamedTuple):
    """Per token: 16-bit elements moved (an fp32 one counts two) and FLOP of products, forward and backward."""

    elements: Real
    backward_elements: Real
    flop: Real
    backward_flop: Real


def scan_work(inner: Real, state_size: Real, groups: Real, chunk: Real) -> ScanWork:
    """Work of the scan of one token.

    In forward, states (reads inputs and keys, writes fp32), their passing (fp32 in, 16 bits out), scores (keys and queries in,
    fp32 out), output (scores, inputs, queries, states and gate in; output, gated and not). In backward, scores and states again,
    the gate's gradient, gradients of states, their passing, of inputs, keys, queries, scores (twice) and steps.

    Args:
        inner: width of inputs and outputs: heads by their width.
        state_size: elements of state per element of ``inner``, the width of a key.
        groups: of heads that share keys and queries.
        chunk: tokens.

    >>> work = scan_work(4096, 128, 8, 128)  # Nemotron 3 Nano
    >>> work.elements, work.flop  # 5 * 4096 + 4 * 1024 + 6 * 4096 + 4 * 1024; 4 * 4096 * 128 + 4096 * 128 + 2 * 1024 * 128
    (53248.0, 2883584.0)
    """
    keys, scores, states = 1.0 * groups * state_size, 1.0 * groups * chunk, 1.0 * inner * state_size / chunk
    return ScanWork(
        elements=5.0 * inner + 4.0 * keys + 6.0 * states + 4.0 * scores,
        backward_elements=17.0 * inner + 19.0 * keys + 17.0 * states + 12.0 * scores,
        flop=4.0 * inner * state_size + inner * chunk + 2.0 * keys * chunk,
        backward_flop=10.0 * inner * state_size + 3.0 * inner * chunk + 6.0 * keys * chunk,
    )
