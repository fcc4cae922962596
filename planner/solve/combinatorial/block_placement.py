"""Where weights, cache and activations of a block of batches lie, for the most tokens per second: FlexGen's linear program.

Streams between device, host and disk take times that are linear in the fractions of what lies where; so is what every place
holds. The program minimises the longest streams of the prompts and of the steps of generation, weighted as often as they occur.

Source: Sheng et al. 2023 (FlexGen, ICML, arXiv:2303.06865), section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.costs.block_schedule import (
    BLOCK_PLACES,
    BlockLinks,
    BlockWork,
    block_layer_s,
    block_tokens_per_s,
)
from planner.solve.combinatorial.milp import Program, solve

__all__ = ["FILLED", "THINGS", "BlockPlacement", "Room", "best_placement", "on_disk"]

FILLED = 0.8
"""Of every place's bytes, what the program may fill: the rest is for fragments (``alpha`` of FlexLLMGen's cost model)."""
THINGS = ("weights", "cache", "hidden")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of the places, per device."""

    device: float
    host: float
    disk: float


@dataclass(frozen=True, slots=True)
class BlockPlacement:
    """A placement and what it delivers on one device.

    Attributes:
        batch, batches: sequences of a batch, and batches of a block.
        placed: fractions by ``weights.device`` …
        tokens_per_s: answers' tokens of one device.
        prefill_s, step_s: of a whole block: its prompts, and a token of each of its answers.
        device_bytes: held on the device, by part.
        binding: the stream that a step of generation waits for.
    """

    batch: int
    batches: int
    placed: Mapping[str, float]
    tokens_per_s: float
    prefill_s: float
    step_s: float
    device_bytes: Mapping[str, float]
    binding: str


def best_placement(
    work: BlockWork,
    links: BlockLinks,
    room: Room,
    layers: float,
    batch: int,
    batches: int,
    buffer_bytes: float = 0.0,
) -> BlockPlacement | None:
    """The fractions that answer most tokens per second in the given room; None where nothing fits."""
    program = Program()
    names = [f"{what}.{place}" for what in THINGS for place in BLOCK_PLACES]
    x = program.variables(np.zeros(len(names)))
    steps = work.answer_tokens - 1.0
    scale = 1.0 / max(work.prefill_s + steps * work.decode_s, 1e-12)
    longest = program.variables(np.array([1.0, steps]) * scale, upper=np.inf)
    for k in range(3):
        program.constrain([x[3 * k : 3 * k + 3]], [np.ones(3)], low=1.0, high=1.0)
    constant, linear = _affine(work, links, names)
    for stream in range(3):
        program.constrain([[*x, longest[0]]], [[*linear[stream], -1.0]], high=-constant[stream])
    for stream in range(4, len(constant)):
        program.constrain(
            [[*x, longest[1]]],
            [[*(linear[stream] + linear[3]), -1.0]],
            high=-(constant[stream] + constant[3]),
        )
    for place, limit in zip(BLOCK_PLACES, (room.device, room.host, room.disk), strict=True):
        held = _held(work, layers, batch, names, place)
        spare = FILLED * limit - (buffer_bytes if place == "device" else 0.0)
        if spare < 0.0:
            return None
        unit = max(float(np.max(np.abs(held))), 1.0)
        program.constrain([x], [held / unit], high=spare / unit)
    solution = solve(program)
    if not solution.found:
        return None
    placed = {
        name: float(np.clip(value, 0.0, 1.0)) for name, value in zip(names, solution.values[x], strict=True)
    }
    prefill, in_s, step = block_layer_s(work, links, placed)
    held = _held(work, layers, batch, names, "device")
    parts = np.array([held[k] * placed[names[k]] for k in range(len(names))])
    device = {
        "weights": float(parts[:3].sum()), "kv_cache": float(parts[3:6].sum()),
        "activations": float(parts[6:].sum()) + buffer_bytes,
    }  # fmt: skip
    slowest = ("way out", "disk reads", "disk writes", "compute")[int(np.argmax(step))]
    return BlockPlacement(
        batch, batches, placed, block_tokens_per_s(work, links, layers, placed), layers * max(prefill),
        layers * (in_s + max(step)), device, "way in" if in_s > max(step) else slowest,
    )  # fmt: skip


def _affine(work: BlockWork, links: BlockLinks, names: list[str]) -> tuple[list[float], list[Any]]:
    """Every stream's seconds as a constant and coefficients of the fractions: prefill's three, the way in, generation's four."""

    def seconds(placed: Mapping[str, float]) -> list[float]:
        prefill, in_s, step = block_layer_s(work, links, placed)
        return [float(v) for v in (*prefill, in_s, *step)]

    none = seconds(dict.fromkeys(names, 0.0))
    columns = [seconds({**dict.fromkeys(names, 0.0), name: 1.0}) for name in names]
    return none, [np.array([column[k] - none[k] for column in columns]) for k in range(len(none))]


def _held(work: BlockWork, layers: float, batch: int, names: list[str], place: str) -> Any:
    """Bytes of a place by fraction; beside its own parts it holds two layers of what passes through."""
    lasting = work.prompt_tokens + work.answer_tokens
    whole = {
        "weights": work.weights_bytes * layers,
        "cache": work.cache_bytes_per_token * work.sequences * lasting * layers,
        "hidden": work.hidden_bytes_per_token * work.sequences * work.prompt_tokens,
    }
    passing = {
        "weights": 2.0 * work.weights_bytes,
        "cache": 0.0,
        "hidden": 2.0 * work.hidden_bytes_per_token * batch * work.prompt_tokens,
    }
    held = np.zeros(len(names))
    for k, name in enumerate(names):
        what, _, where = name.partition(".")
        if where == place:
            held[k] = whole[what]
        through = (place == "device" and where != "device") or (place == "host" and where == "disk")
        if through:
            held[k] = passing[what]
    return held


def on_disk(
    work: BlockWork,
    links: BlockLinks,
    room: Room,
    layers: float,
    batch: int,
    batches: int,
    buffer_bytes: float = 0.0,
) -> BlockPlacement:
    """Everything on the disk: what runs without a program."""
    placed = {f"{what}.{place}": float(place == "disk") for what in THINGS for place in BLOCK_PLACES}
    prefill, in_s, step = block_layer_s(work, links, placed)
    tokens_per_s = block_tokens_per_s(work, links, layers, placed)
    held = {"weights": 2.0 * work.weights_bytes, "kv_cache": 0.0, "activations": buffer_bytes}
    step_s = layers * (in_s + max(step))
    return BlockPlacement(
        batch, batches, placed, tokens_per_s, layers * max(prefill), step_s, held, "disk reads"
    )
