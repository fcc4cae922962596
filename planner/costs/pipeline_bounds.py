"""Lower bounds on a pipelined step with unequal stages and transfer times, for a million candidates at once.

Each bound is the length of a path through the schedule's dependencies, so the makespan cannot be shorter.
Stages are given as *runs* of equal neighbours: a pipeline has a handful of classes (first, middle, last …),
whatever its depth. Arrays are (runs, *batch), ``lengths`` is (runs,) or (runs, *batch) and counts a run's
stages (1 each by default; 0 leaves a run out). ``hop_s`` delays every edge between neighbouring stages, in
both directions. All paths start and end on device 0: work of device 0 before its first and after its last
operation may be added.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["bound_1f1b_s", "bound_flush_s", "bound_interleaved_s"]

Array: TypeAlias = npt.NDArray[np.floating[Any]]


def bound_flush_s(
    forward_s: npt.ArrayLike,
    backward_s: npt.ArrayLike,
    micro_batches: npt.ArrayLike,
    hop_s: npt.ArrayLike = 0.0,
    lengths: npt.ArrayLike | None = None,
) -> Array:
    """Any schedule with one chunk per device: ``max(max_i(m·T_i + Σ_{j<i} T_j + 2ic), Σ T + 2(p − 1)c)``.

    A stage works ``m·T_i``; before that the first micro-batch passes the stages in front of it, and after it
    the last one goes back through them. One micro-batch passes everything. Within a run the last stage binds.

    Returns:
        (*batch,) seconds.

    >>> float(bound_flush_s([1.0, 1.0], [2.0, 2.0], 4))  # 4·3 + 3
    15.0
    """
    runs = _Runs.of(forward_s, backward_s, hop_s, lengths)
    m = np.asarray(micro_batches, dtype=float)
    bound: Array = runs.through[-1]
    for b in range(len(runs.length)):
        path = runs.through[b] + (m - 1.0) * runs.work[b]
        bound = np.where(runs.length[b] > 0, np.maximum(bound, path), bound)
    return bound


def bound_1f1b_s(
    forward_s: npt.ArrayLike,
    backward_s: npt.ArrayLike,
    micro_batches: npt.ArrayLike,
    hop_s: npt.ArrayLike = 0.0,
    lengths: npt.ArrayLike | None = None,
) -> Array:
    """1F1B with flush; exact for equal stages with any hop.

    Stage ``i`` runs ``w_i = min(m, p − 1 − i)`` forwards before it alternates, so ``F_j(k)`` is followed by
    ``B_j(k − w_j)``, and ``B_i(k)`` by ``F_i(k + p − i)``. Hence down from ``j`` to ``i`` and back is a cycle

    ``B_j(k) → … → B_i(k) → F_i(k + p − i) → … → F_j(k + p − i) → B_j(k + n)``, ``n = j − i + 1``

    of length ``C_ij = Σ_{l=i..j} T_l + 2(j − i)c``: the steady period is at least ``C_ij/n`` per micro-batch.
    The bound is the best of these paths, over ``i`` at the first and ``j`` at the last stage of runs (within
    a run ``C_ij/n`` is monotone in ``i`` and in ``j``):

    ``Σ_{l≤j} T_l + 2jc + E_j + q·C_ij + C_{j−r+1,j} + D_j``, ``q·n + r = m − 1 − w_j``, ``1 ≤ r ≤ n``

    It starts at ``F_0(0)``; reaches ``B_j(0)`` after ``F_l(0)``, ``l ≤ j``, and a detour ``E_j``; goes ``q``
    times round ``(i, j)`` and once round the last ``r`` stages of it, which ends with ``F_j(m − 1)``; and
    reaches ``B_0(m − 1)`` after a detour ``D_j`` and ``B_l(m − 1)``, ``l ≤ j``. A detour goes up to a stage
    ``t ≥ j`` and back, and waits on the slowest stage ``l ≤ t`` for the ``w_t`` forwards of the warm-up, or
    backwards of the cool-down: ``E_j = max_t (Σ_{j<l≤t} T_l + 2(t − j)c + w_t·max_{l≤t} F_l)``, and ``D_j``
    the same with ``B_l``.

    Returns:
        (*batch,) seconds.

    >>> float(bound_1f1b_s([1.0], [2.0], 8, 0.5, [4]))  # four equal stages: 11·3 + 2·0.5·8, as latency_1f1b_s
    41.0
    """
    runs = _Runs.of(forward_s, backward_s, hop_s, lengths)
    m = np.asarray(micro_batches, dtype=float)
    bound = bound_flush_s(forward_s, backward_s, micro_batches, hop_s, lengths)
    fill, drain = runs.detours(runs.forward), runs.detours(runs.backward)
    for b in range(len(runs.length)):
        advance = m - runs.after[b] - 1.0
        ends = runs.through[b] + fill[b] + drain[b]
        for a in range(b + 1):
            stages = runs.before[b + 1] - runs.before[a]
            laps = np.ceil(advance / np.maximum(stages, 1.0)) - 1.0
            rest = advance - laps * stages
            path = ends + laps * runs.cycle(a, b, stages) + runs.cycle(a, b, rest)
            bound = np.where((advance >= 1.0) & (stages >= 1.0), np.maximum(bound, path), bound)
    return bound


def bound_interleaved_s(
    forward_s: npt.ArrayLike,
    backward_s: npt.ArrayLike,
    micro_batches: npt.ArrayLike,
    hop_s: npt.ArrayLike = 0.0,
    lengths: npt.ArrayLike | None = None,
    group: npt.ArrayLike | None = None,
) -> Array:
    """Interleaved 1F1B of ``v ≥ 2`` chunks; exact for equal stages without hops.

    With ``N`` micro-batches to a group (``p`` by default), device ``r`` alternates after ``w_r = 2(p − 1 − r)
    + (v − 1)N`` forwards. The bound is the best of these paths, over ``r`` at the last device of runs:

    - *fill*: until device ``r`` begins its first backward. Either its ``w_r + 1`` forwards, after the first
    micro-batch
      has passed chunk 0 of the devices before it; or the first micro-batch up through all ``pv`` stages and
      back to ``r``;
    - *steady*: its ``m·v − 1 − w_r`` pairs of a backward and a forward;
    - *drain*: the mirror image of the fill.

    Where ``m`` is no multiple of ``N``, only ``m·ΣT_r`` between the first forward and the last backward of
    chunk 0, and one micro-batch through everything.

    Args:
        forward_s, backward_s: (v, runs, *batch); virtual stage ``c·p + r`` is chunk ``c`` of device ``r``.
        micro_batches, hop_s: (*batch).
        lengths: (runs,) or (runs, *batch), devices per run.
        group: (*batch).

    Returns:
        (*batch,) seconds.

    >>> one = [[1.0], [1.0]]  # p = 4, v = 2, m = 8: 8·2·3 + 3·3, in half stages
    >>> float(bound_interleaved_s(one, [[2.0], [2.0]], 8, 0.0, [4]))
    57.0
    """
    forward, backward = (np.asarray(x, dtype=float) for x in (forward_s, backward_s))
    chunks = [_Runs.of(f, b, hop_s, lengths) for f, b in zip(forward, backward, strict=True)]
    first, last, v = chunks[0], chunks[-1], len(chunks)
    m, p = np.asarray(micro_batches, dtype=float), first.before[-1]
    hop = np.where(p > 1.0, first.hop, 0.0)  # all chunks on one device: nothing is sent
    size = p if group is None else np.asarray(group, dtype=float)
    up = sum(c.forward_sum[-1] for c in chunks) + (p * v - 1.0) * hop
    down = sum(c.backward_sum[-1] for c in chunks) + (p * v - 1.0) * hop
    bound: Array = up + down
    for b in range(len(first.length)):
        beyond = first.after[b]
        extra = 2.0 * beyond + 1.0
        held = [size] * (v - 1) + [np.minimum(size, extra)]
        held[0] = held[0] + np.maximum(extra - size, 0.0)
        fill_work = sum(n * c.forward[b] for n, c in zip(held, chunks, strict=True))
        drain_work = sum(n * c.backward[b] for n, c in zip(held, chunks, strict=True))
        total = m * sum(c.work[b] for c in chunks)
        ramp_up = first.forward_sum[b + 1] - first.forward[b] + (p - 1.0 - beyond) * hop
        ramp_down = first.backward_sum[b + 1] - first.backward[b] + (p - 1.0 - beyond) * hop
        back = last.backward_sum[-1] - last.backward_sum[b + 1] + beyond * hop
        ahead = last.forward_sum[-1] - last.forward_sum[b + 1] + beyond * hop
        whole = ramp_up + total + ramp_down
        fill = np.maximum(ramp_up + fill_work, up + back)
        drain = np.maximum(ramp_down + drain_work, down + ahead)
        steady = total - fill_work - drain_work
        known = (m % size == 0) & (m * v - (v - 1.0) * size >= extra + 1.0)
        path = np.where(known, fill + steady + drain, whole)
        bound = np.where(first.length[b] > 0, np.maximum(bound, path), bound)
    return bound


class _Runs(NamedTuple):
    """Runs of equal stages and what the paths over them need, one array (*batch,) per run.

    Attributes:
        forward, backward, work: seconds of a stage of the run; ``work`` is their sum.
        length: stages of the run.
        before: stages before the run; one entry more, the last being ``p``.
        after: stages after the run's last one.
        forward_sum, backward_sum: seconds of all stages before the run; one entry more.
        through: a micro-batch from device 0 to the run's last stage and back, hops included.
    """

    forward: list[Array]
    backward: list[Array]
    work: list[Array]
    length: list[Array]
    before: list[Array]
    after: list[Array]
    forward_sum: list[Array]
    backward_sum: list[Array]
    through: list[Array]
    hop: Array

    @classmethod
    def of(
        cls,
        forward_s: npt.ArrayLike,
        backward_s: npt.ArrayLike,
        hop_s: npt.ArrayLike,
        lengths: npt.ArrayLike | None,
    ) -> _Runs:
        forward, backward = (
            list(np.asarray(forward_s, dtype=float)),
            list(np.asarray(backward_s, dtype=float)),
        )
        length = list(np.ones(len(forward)) if lengths is None else np.asarray(lengths, dtype=float))
        hop = np.asarray(hop_s, dtype=float)
        before = _running(length)
        forward_sum = _running([f * n for f, n in zip(forward, length, strict=True)])
        backward_sum = _running([b * n for b, n in zip(backward, length, strict=True)])
        through: list[Array] = [
            f + b + 2.0 * (n - 1.0) * hop
            for f, b, n in zip(forward_sum[1:], backward_sum[1:], before[1:], strict=True)
        ]
        work: list[Array] = [f + b for f, b in zip(forward, backward, strict=True)]
        after: list[Array] = [before[-1] - n for n in before[1:]]
        return cls(forward, backward, work, length, before, after, forward_sum, backward_sum, through, hop)

    def cycle(self, a: int, b: int, stages: Array) -> Array:
        """``C`` of the last ``stages ≥ 1`` stages of runs ``a`` to ``b``."""
        total = 2.0 * (stages - 1.0) * self.hop
        left = stages
        for x in range(b, a - 1, -1):
            taken = np.minimum(left, self.length[x])
            total = total + taken * self.work[x]
            left = left - taken
        return total

    def detours(self, waits_s: list[Array]) -> list[Array]:
        """``E_j`` (of the forwards) or ``D_j`` (of the backwards) at the last stage of each run."""
        slowest: list[Array] = []
        seen: Array = np.zeros(())
        for wait_s, n in zip(waits_s, self.length, strict=True):
            seen = np.maximum(seen, np.where(n > 0, wait_s, 0.0))
            slowest.append(seen)
        found: list[Array] = []
        further: Array = np.zeros(())
        for b in range(len(waits_s) - 1, -1, -1):
            further = np.maximum(further, self.after[b] * slowest[b])
            found.append(further)
            further = further + self.length[b] * (self.work[b] + 2.0 * self.hop)
        return found[::-1]


def _running(values: list[Array]) -> list[Array]:
    sums: list[Array] = [np.zeros(())]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
