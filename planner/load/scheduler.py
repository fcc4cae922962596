"""Which requests an iteration takes: the published batching policies as choices of a few rules, and the pool of KV blocks.

All of them are one loop; they differ in whether prompts and decodes share an iteration, whether prompts are cut, when
requests are admitted, and what KV memory they take then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from planner.errors import Problem, SpecError, did_you_mean

__all__ = ["SCHEDULERS", "KvPool", "Scheduler", "scheduler"]

_MANY = 2**62


@dataclass(frozen=True, slots=True)
class Scheduler:
    """The rules of a batching policy.

    Attributes:
        max_requests: requests that run at once.
        token_budget: tokens of an iteration, decodes included; a prompt that is not cut may exceed it alone.
        mixed: prompts and decodes share an iteration; otherwise prompts go first and decodes wait.
        chunked: prompts are cut to the budget.
        gated: requests are admitted only when nothing runs, are padded to the longest, and end together.
        reserve: KV tokens taken at admission: of the prompt, or of the whole request.
        order: who waits in front: the first to come, or the lowest priority number (and it may displace higher ones).
        preemption: what happens to the KV of a request that gives way: computed again, or swapped to the host.
    """

    max_requests: int = 256
    token_budget: int = 8192
    mixed: bool = True
    chunked: bool = True
    gated: bool = False
    reserve: Literal["prompt", "whole"] = "prompt"
    order: Literal["arrival", "priority"] = "arrival"
    preemption: Literal["recompute", "swap"] = "recompute"

    def __post_init__(self) -> None:
        faults = [
            Problem(name, repr(value), "a whole number from 1")
            for name in ("max_requests", "token_budget")
            if not (isinstance(value := getattr(self, name), int) and value >= 1)
        ]
        if faults:
            raise SpecError(faults)

    @property
    def takes_all(self) -> bool:
        """Whether an iteration takes the prompts of all that it admits, however many tokens they have."""
        return self.token_budget >= _MANY


SCHEDULERS: Mapping[str, Scheduler] = {
    "static": Scheduler(token_budget=_MANY, mixed=False, chunked=False, gated=True, reserve="whole"),
    "orca": Scheduler(token_budget=_MANY, chunked=False, reserve="whole"),
    "vllm": Scheduler(mixed=False, chunked=False),
    "sarathi": Scheduler(token_budget=512),
}
"""``static`` is request-level batching; ``orca`` iteration-level batching (OSDI 2022) with memory reserved for the whole request;
``vllm`` prompts first, paged memory (SOSP 2023); ``sarathi`` chunks of prompts beside all decodes (OSDI 2024)."""


def scheduler(name: str, max_requests: int | None = None, token_budget: int | None = None) -> Scheduler:
    """The policy of this name, with limits of one's own.

    Raises:
        SpecError: no such policy, or a limit below 1.

    >>> scheduler("sarathi", token_budget=2048).chunked
    True
    """
    if name not in SCHEDULERS:
        hint = did_you_mean(name, SCHEDULERS)
        raise SpecError(Problem("scheduler", repr(name[:40]), f"one of {', '.join(SCHEDULERS)}", hint))
    rules = SCHEDULERS[name]
    return replace(
        rules,
        max_requests=rules.max_requests if max_requests is None else max_requests,
        token_budget=rules.token_budget if token_budget is None else token_budget,
    )


@dataclass(frozen=True, slots=True)
class KvPool:
    """KV memory in blocks (W. Kwon et al., "PagedAttention", SOSP 2023, section 4).

    Attributes:
        blocks: blocks in the pool.
        block_tokens: tokens of a block.
        watermark_blocks: blocks that an admission leaves free, so that running requests can grow.
        swap_s_per_block: seconds to move a block to the host, or back.
    """

    blocks: int = _MANY
    block_tokens: int = 16
    watermark_blocks: int = 0
    swap_s_per_block: float = 0.0

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one request."""
        return -(-tokens // self.block_tokens)
