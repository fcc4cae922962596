"""From one block per layer to a model's named block kinds and the runs in which they occur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from planner.specs.model import Block

__all__ = ["LayerPlan", "arrange"]


class LayerPlan(NamedTuple):
    """Block kinds by name, and the order of execution as runs of (name, repeat)."""

    blocks: dict[str, Block]
    layers: tuple[tuple[str, int], ...]
    encoder_layers: tuple[tuple[str, int], ...]


def arrange(layers: Sequence[Block], encoder: Sequence[Block] = ()) -> LayerPlan:
    """Names equal blocks alike and joins neighbours into runs.

    Names say what a layer is made of: ``dense`` or ``moe`` after full attention, ``local-dense`` after
    windowed attention, ``ssm-moe`` after a state-space mixer, a mixer's name alone where no network follows.

    >>> from planner.specs.model import Attention, Mlp
    >>> local = Block(Attention(8, 8, 64, window=512), mlp=Mlp(2048))
    >>> full = Block(Attention(8, 8, 64), mlp=Mlp(2048))
    >>> arrange([local, local, full, local]).layers
    (('local-dense', 2), ('dense', 1), ('local-dense', 1))
    """
    blocks: dict[str, Block] = {}
    encoder_layers = _runs(encoder, blocks, "encoder-")
    return LayerPlan(blocks, _runs(layers, blocks, ""), encoder_layers)


def _runs(layers: Sequence[Block], blocks: dict[str, Block], prefix: str) -> tuple[tuple[str, int], ...]:
    runs: list[tuple[str, int]] = []
    previous: Block | None = None
    for block in layers:
        # Neighbours are mostly one object; comparing identities first keeps deep stacks cheap.
        if previous is not None and (block is previous or block == previous):
            name, repeat = runs[-1]
            runs[-1] = (name, repeat + 1)
        else:
            runs.append((_name(block, blocks, prefix), 1))
        previous = block
    return tuple(runs)


def _name(block: Block, blocks: dict[str, Block], prefix: str) -> str:
    base = prefix + _kind(block)
    name, number = base, 1
    while name in blocks and blocks[name] != block:
        number += 1
        name = f"{base}-{number}"
    blocks[name] = block
    return name


def _kind(block: Block) -> str:
    mixers = []
    if block.attention is not None:
        mixers.append("local" if block.attention.window else "attention")
    if block.ssm is not None:
        mixers.append("ssm")
    networks = [n for n, part in (("dense", block.mlp), ("moe", block.moe)) if part is not None]
    if mixers == ["attention"] and networks:
        mixers = []
    return "-".join((*mixers, *networks)) or "empty"
