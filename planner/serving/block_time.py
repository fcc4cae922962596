"""How long an offloaded engine's iterations take: blocks of any number of sequences, placed as a plan says.

A block's prompts are one iteration, a token of each of its answers another; whoever comes in the meantime waits for the next
block. Weights come in for a block however few sequences it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.costs.block_schedule import BlockLinks, BlockWork, block_layer_s
from planner.ledger import Array

__all__ = ["BlockTime"]


@dataclass(frozen=True, slots=True)
class BlockTime:
    """An iteration time (:class:`planner.load.iteration_time.IterationTime`) of one device.

    Attributes:
        work: of a layer and a whole block, of prompts and answers of the plan's lengths.
        links: between the places.
        placed: fractions by ``weights.device`` …
        layers: of the model.
        batch: sequences of one of the batches of a block, which is computed whole.

    >>> links = BlockLinks(10.0, 10.0, 10.0, 5.0, 5.0, 5.0, 5.0)
    >>> work = BlockWork(100.0, 0.0, 0.0, 4.0, 8.0, 2.0, 30.0, 3.0, 0.0, 0.0)
    >>> placed = {f"{w}.{p}": 0.0 for w in ("weights", "cache", "hidden") for p in ("device", "host", "disk")}
    >>> time = BlockTime(work, links, {**placed, "weights.host": 1.0}, 2.0, 2)
    >>> time(4, 32, 0, 0).tolist(), time(1, 8, 0, 0).tolist()  # 100 bytes at 10 per second, and 3 s or half of them
    (26.0, 23.0)
    """

    work: BlockWork
    links: BlockLinks
    placed: Mapping[str, float]
    layers: float
    batch: int

    def __call__(
        self, decodes: Any, context_tokens: Any, prefill_tokens: Any, prefill_context_tokens: Any
    ) -> Array:
        """Seconds of iterations; the arguments broadcast."""
        n, seen, m = np.broadcast_arrays(
            *(np.asarray(x, dtype=float) for x in (decodes, context_tokens, prefill_tokens))
        )
        prompts, answers = (
            np.where(x > 0.0, seconds, 0.0)
            for x, seconds in ((m, self._prompts_s(m)), (n, self._step_s(n, seen)))
        )
        return np.asarray(prompts + answers)

    def line(self, decodes: int, prefill_tokens: int) -> tuple[float, float, float]:
        """Seconds as ``(base, per context token, per prefill context token)``, exact at the plan's ends of contexts."""
        base_s = float(self._prompts_s(np.asarray(float(prefill_tokens)))) if prefill_tokens else 0.0
        if not decodes:
            return base_s, 0.0, 0.0
        n = np.asarray(float(decodes))
        ends = [n * self.work.prompt_tokens, n * (self.work.prompt_tokens + self.work.answer_tokens)]
        low_s, high_s = (float(self._step_s(n, seen)) for seen in ends)
        slope = (high_s - low_s) / float(ends[1] - ends[0])
        return base_s + low_s - slope * float(ends[0]), slope, 0.0

    def _prompts_s(self, tokens: Array) -> Array:
        """Prompts of the plan's length, so many tokens of them."""
        work, sequences = self.work, tokens / self.work.prompt_tokens
        scaled: dict[str, Any] = {
            "sequences": sequences,
            "prefill_s": work.prefill_s * sequences / work.sequences,
        }
        prefill, _, _ = block_layer_s(replace(work, **scaled), self.links, self.placed)
        return np.asarray(self.layers * np.maximum.reduce(np.broadcast_arrays(*prefill)))

    def _step_s(self, sequences: Array, context_tokens: Array) -> Array:
        """A token of each sequence; batches that are not full take as long as full ones."""
        work, each = self.work, np.divide(context_tokens, np.maximum(sequences, 1.0))
        usual = work.prompt_tokens + work.answer_tokens / 2.0
        share = sequences / work.sequences * each / usual
        whole = np.ceil(sequences / self.batch) * self.batch / work.sequences
        scaled: dict[str, Any] = {
            "sequences": sequences, "prompt_tokens": each, "answer_tokens": 0.0, "decode_s": work.decode_s * whole,
            "attention_device_s": work.attention_device_s * share, "attention_host_s": work.attention_host_s * share,
        }  # fmt: skip
        _, in_s, step = block_layer_s(replace(work, **scaled), self.links, self.placed)
        return np.asarray(self.layers * (in_s + np.maximum.reduce(np.broadcast_arrays(*step))))
