"""A Galvatron strategy file as the choices of a plan; layers may differ in degrees, sharding and recomputation.

The file names neither model, sequence nor precision, and leaves the number of devices to the launch: data degrees and sizes of
micro-batches follow from these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import did_you_mean
from planner.export.galvatron import DEFAULT_TYPES, PIPELINES
from planner.export.launched import LaunchedRun, ignored_note, names_in, read_json
from planner.export.layers import layerwise_of
from planner.pipeline.layout import layout_name
from planner.specs.reader import Reader

__all__ = ["read_galvatron"]

_KNOWN = names_in(
    "pp_deg tp_sizes_enc tp_consecutive_flags cp_sizes_enc dp_types_enc use_sp checkpoint global_bsz "
    "chunks pp_division pipeline_type default_dp_type vtp vsp vcp embed_sdp"
)

_MOST_STAGES = 4096


def read_galvatron(path: str | Path) -> LaunchedRun:
    """The run that a Galvatron JSON describes.

    Raises:
        SpecError: the file cannot be read, or keys are wrong; all at once.
    """
    reader = Reader(read_json(path, "a Galvatron strategy"), str(path))
    batch, chunks = (reader.integer(key) for key in ("global_bsz", "chunks"))
    layers = _layers(reader)
    stages = _stages(reader, len(layers.own))
    fixed = _knobs(reader, layers, stages)
    layerwise = _layerwise(layers, stages, fixed)
    if layers.unlike and fixed["schedule"] == "gpipe":
        found = "gpipe with layers of unlike degrees: not modelled"
        reader.problem("pipeline_type", found, PIPELINES["1f1b"])
    ignored = tuple(sorted(key for key in reader.data if key not in _KNOWN))
    notes = [*_notes(reader, layers, ignored), *ignored_note(ignored)]
    reader.raise_if_any()
    return LaunchedRun(
        "galvatron", None, {"global_batch_size": batch, "optimizer": "adamw"}, fixed, None, tuple(notes),
        tuple(_wasteful(fixed)), ignored,
        missing={"micro_batch_size": f"it is {batch} / ({chunks} chunks · data-parallel ranks)"},
        micro_batches=chunks, layerwise=layerwise,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Layers:
    """What layers choose, and embedding and head: (tensor, context) degrees, and choices by slot."""

    ways: list[tuple[int, int]]
    own: list[dict[str, str]]
    end_way: tuple[int, int]
    end: dict[str, str]

    @property
    def unlike(self) -> bool:
        """Whether degrees differ."""
        return len({*self.ways, self.end_way}) > 1

    @property
    def alike(self) -> bool:
        """Whether all choose the same."""
        sharded = self.end["zero_stage"] == self.own[0]["zero_stage"]
        return not self.unlike and sharded and all(own == self.own[0] for own in self.own)


def _layers(reader: Reader) -> _Layers:
    degrees = _per_layer(reader, "tp_sizes_enc")
    count = len(degrees)
    ulysses = _per_layer(reader, "use_sp", count, 0)
    vocabulary = reader.integer("vtp", degrees[0])
    shared = reader.integer("vsp", int(ulysses[0] == 1), minimum=0, maximum=1)
    if 0 in _per_layer(reader, "tp_consecutive_flags", count, 1):
        reader.problem("tp_consecutive_flags", "0: groups of ranks that are apart are not modelled", "1")
    if max(_per_layer(reader, "cp_sizes_enc", count, 1)) > 1:
        reader.problem("cp_sizes_enc", "ring attention of Galvatron: not modelled", "1")
    sharded, again = (_per_layer(reader, key, count, 0) for key in ("dp_types_enc", "checkpoint"))
    named = reader.text("default_dp_type", "ddp", choices=DEFAULT_TYPES.values())
    plain = {word: knob for knob, word in DEFAULT_TYPES.items()}.get(named, "0")
    ends = reader.integer("embed_sdp", int(all(sharded)), minimum=0, maximum=1)
    own = [
        {"zero_stage": "3" if shard else plain, "recompute": "full" if full else "none"}
        for shard, full in zip(sharded, again, strict=False)
    ]
    return _Layers(
        [_way(degree, by) for degree, by in zip(degrees, ulysses, strict=False)],
        own,
        _way(vocabulary, shared),
        {"zero_stage": "3" if ends else plain, "recompute": own[-1]["recompute"]},
    )


def _knobs(reader: Reader, layers: _Layers, stages: Sequence[int]) -> dict[str, Any]:
    """Choices of the plan; degrees are those of the embedding, which stands first where layers differ."""
    pipeline = reader.text("pipeline_type", "gpipe", choices=PIPELINES.values())
    schedules = {word: knob for knob, word in PIPELINES.items()}
    (tp, cp), ulysses = layers.end_way, any(cp > 1 for _, cp in (*layers.ways, layers.end_way))
    return {
        "pp": len(stages), "tp": tp, "cp": cp, "ep": 1, "etp": 1, **layers.own[0], "zero_group": "full",
        "schedule": schedules.get(pipeline, "gpipe") if len(stages) > 1 else "1f1b", "virtual_stages": 1,
        "optimizer": "adamw", "optimizer_offload": "none", "parameter_offload": "none", "tensor_overlap": "none",
        **_cut(layers.end_way), "context": "a2a" if ulysses else "p2p", "pipeline_layout": layout_name(stages),
    }  # fmt: skip


def _layerwise(layers: _Layers, stages: Sequence[int], fixed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Choices of every layer, and the degrees of its place where these differ; None where all layers are alike."""
    if layers.alike:
        return None
    if not layers.unlike:
        return layerwise_of(fixed, layers.own, stages, layers.end)
    ways = list(dict.fromkeys([*layers.ways, layers.end_way]))
    numbers = [ways.index(way) for way in (*layers.ways, layers.end_way)]
    places = [
        {"group": 0, "mesh": {"tp": tp, "cp": cp, "ep": 1, "etp": 1}, "choices": _cut((tp, cp))}
        for tp, cp in ways
    ]
    return layerwise_of(fixed, layers.own, stages, layers.end, numbers) | {"places": places}


def _notes(reader: Reader, layers: _Layers, ignored: Sequence[str]) -> Iterator[str]:
    """What was taken for granted, and what unknown keys may have meant."""
    yield "Precision is taken as bf16, gradients are reduced in it: --precision, --fix gradient_dtype."
    if any(tp > 1 for tp, _ in (*layers.ways, layers.end_way)):
        yield "Whether tensor-parallel ranks share the sequence (--sequence-parallel) is said at launch: it is taken so."
    for key in ignored:
        hint = did_you_mean(key, _KNOWN)
        if hint:
            yield f"{key}: {hint}"
    if reader.integer("vcp", 1) != 1:
        yield f"vcp = {reader.data['vcp']}: embedding and head are priced without it."


def _wasteful(fixed: Mapping[str, Any]) -> Iterator[str]:
    if fixed["zero_stage"] == "0":
        yield "With default_dp_type ddp, every replica keeps all optimizer states."
    if fixed["schedule"] == "gpipe":
        yield "pipeline_type gpipe keeps the activations of all micro-batches; pipedream_flush those of pp."


def _per_layer(reader: Reader, key: str, layers: int | None = None, default: int | None = None) -> list[int]:
    """Whole numbers between commas, one per layer."""
    if default is not None and key not in reader.data:
        return [default] * (layers or 1)
    text = reader.text(key)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        reader.problem(key, repr(text)[:60], "whole numbers between commas, one per layer")
        return [default or 1] * (layers or 1)
    if layers is not None and len(parts) != layers:
        reader.problem(key, f"{len(parts)} numbers", f"{layers}, as tp_sizes_enc has")
    return [int(part) for part in parts]


def _way(degree: int, ulysses: int) -> tuple[int, int]:
    """Tensor and context degree."""
    return (1, max(degree, 1)) if ulysses == 1 else (max(degree, 1), 1)


def _cut(way: tuple[int, int]) -> dict[str, str]:
    """How layers of some degrees cut their work."""
    tp, cp = way
    return {"sequence_parallel": str(tp > 1).lower(), "context": "a2a" if cp > 1 else "p2p"}


def _stages(reader: Reader, layers: int) -> list[int]:
    """Layers of every stage: as the file says, or equal, what is left over on the last one (hybrid_parallel_config.py)."""
    pp = reader.integer("pp_deg", maximum=_MOST_STAGES)
    each = layers // pp
    given = "pp_division" in reader.data
    stages = _per_layer(reader, "pp_division") if given else [*[each] * (pp - 1), layers - each * (pp - 1)]
    if len(stages) != pp or sum(stages) != layers or not each:
        reader.problem(
            "pp_division", "-".join(map(str, stages[:8])), f"{pp} stages of {layers} layers together"
        )
        return [layers]
    return stages
