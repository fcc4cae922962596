"""What matrix products lose where their rows do not start at the addresses that matrix units are fed from.

Tensor cores are fed in whole vectors: rows of 16 bytes are needed for the usual kernels, rows of 128 bytes for the best ones
(NVIDIA, "Matrix Multiplication Background User's Guide", DU-09799-001, section 2.2: multiples of 16 bytes, of 128 on A100).
"""

from __future__ import annotations

import numpy as np

from planner.costs.arrays import Real

__all__ = ["alignment_efficiency"]


PARTLY_ALIGNED, HARDLY_ALIGNED = 0.7, 0.3
"""Rates of fp16 and bf16 products on Ampere. Fitted by benchmarks/fit_stacks.py's error on BigScience's BLOOM sweeps (A100,
57 runs whose widths and heads are multiples of 64, of 8 or of 2 elements); taken for other parts with tensor cores too."""


def alignment_efficiency(
    n: Real, k: Real, bytes_per_element: Real, *, partly: Real = PARTLY_ALIGNED, hardly: Real = HARDLY_ALIGNED
) -> Real:
    """Rate of a product of (m, k) by (k, n), relative to one whose rows are all multiples of 128 bytes.

    ``partly`` where the rows of an operand or of the result are only multiples of 16 bytes, ``hardly`` where not even that.

    >>> [float(alignment_efficiency(n, 4096, 2.0, partly=0.9, hardly=0.3)) for n in (4096, 1800, 150)]
    [1.0, 0.9, 0.3]
    """
    # The lowest set bit of either row length is all that counts.
    n_bytes, k_bytes = (np.asarray(x * bytes_per_element).astype(np.int64) for x in (n, k))
    low = (n_bytes | k_bytes) & 127
    broken = low & 15 != 0
    rate: Real = (low == 0) * 1.0 + partly * ((low != 0) & ~broken) + hardly * broken
    return rate
