"""A Galvatron strategy file as the choices of a plan; layers may differ in degrees, sharding and recomputation.

The file names neither model, sequence nor precision, and leaves the number of devices to the launch: data degrees and sizes of
micro-batches follow from these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.errors import did_you_mean
from planner.export.galvatron import DEFAULT_TYPES, PIPELINES
from planner.export.launched import LaunchedRun, ignored_note, names_in, read_json
from planner.export.layers import layerwise_of
from planner.layout import layout_name
from planner.specs.reader import Reader

__all__ = ["read_galvatron"]

_KNOWN = names_in(
    "pp_deg tp_sizes_enc tp_consecutive_flags cp_sizes_enc dp_types_enc use_sp checkpoint global_bsz "
    "chunks pp_division pipeline_type default_dp_type vtp vsp vcp embed_sdp"
)


def read_galvatron(path: str | Path) -> LaunchedRun:
    """The run that a Galvatron JSON describes.

    Raises:
        SpecError: the file cannot be read, or keys are wrong; all at once.
    """
    data = read_json(path, "a Galvatron strategy")
    reader = Reader(data, str(path))
    pp, batch, chunks = (reader.integer(key) for key in ("pp_deg", "global_bsz", "chunks"))
    degrees = _per_layer(reader, "tp_sizes_enc")
    layers = len(degrees)
    ulysses = _per_layer(reader, "use_sp", layers, 0)
    ways = [_way(degree, by) for degree, by in zip(degrees, ulysses, strict=False)]
    end = _way(
        reader.integer("vtp", degrees[0]), reader.integer("vsp", int(ulysses[0] == 1), minimum=0, maximum=1)
    )
    unlike = len({*ways, end}) > 1
    context = max(_per_layer(reader, "cp_sizes_enc", layers, 1))
    sharded = _per_layer(reader, "dp_types_enc", layers, 0)
    again = _per_layer(reader, "checkpoint", layers, 0)
    if 0 in _per_layer(reader, "tp_consecutive_flags", layers, 1):
        reader.problem("tp_consecutive_flags", "0: groups of ranks that are apart are not modelled", "1")
    if context > 1:
        reader.problem("cp_sizes_enc", "ring attention of Galvatron: not modelled", "1")
    default = reader.text("default_dp_type", "ddp", choices=DEFAULT_TYPES.values())
    pipeline = reader.text("pipeline_type", "gpipe", choices=PIPELINES.values())
    plain = {word: knob for knob, word in DEFAULT_TYPES.items()}.get(default, "0")
    ends = "3" if reader.integer("embed_sdp", int(all(sharded)), minimum=0, maximum=1) else plain
    own = [
        {"zero_stage": "3" if shard else plain, "recompute": "full" if full else "none"}
        for shard, full in zip(sharded, again, strict=False)
    ]
    stage = own[0]["zero_stage"]
    notes = ["Precision is taken as bf16, gradients are reduced in it: --precision, --fix gradient_dtype."]
    fixed: dict[str, Any] = {
        "pp": pp, "tp": end[0], "cp": end[1], "ep": 1, "etp": 1, "zero_stage": stage, "zero_group": "full",
        "recompute": own[0]["recompute"],
        "schedule": {word: knob for knob, word in PIPELINES.items()}[pipeline] if pp > 1 else "1f1b", "virtual_stages": 1,
        "optimizer": "adamw", "optimizer_offload": "none", "parameter_offload": "none", "tensor_overlap": "none",
    }  # fmt: skip
    fixed |= _cut(end)  # as in a plan whose layers differ: what stands first is the embedding
    fixed["context"] = "a2a" if 1 in ulysses or end[1] > 1 else "p2p"
    if any(tp > 1 for tp, _ in (*ways, end)):
        notes.append(
            "Whether tensor-parallel ranks share the sequence (--sequence-parallel) is said at launch: it is taken so."
        )
    stages = _stages(reader, layers, pp)
    fixed["pipeline_layout"] = layout_name(stages)
    alike = all(mine == own[0] for mine in own) and ends == stage
    layerwise = None
    if unlike and fixed["schedule"] == "gpipe":
        reader.problem(
            "pipeline_type", "gpipe with layers of unlike degrees: not modelled", PIPELINES["1f1b"]
        )
    if unlike or not alike:
        at_ends = {"zero_stage": ends, "recompute": own[-1]["recompute"]}
        places = list(dict.fromkeys([*ways, end]))
        numbers = [places.index(way) for way in (*ways, end)] if unlike else []
        layerwise = layerwise_of(fixed, own, stages, at_ends, numbers)
        if unlike:
            layerwise["places"] = [
                {"group": 0, "mesh": {"tp": tp, "cp": cp, "ep": 1, "etp": 1}, "choices": _cut((tp, cp))}
                for tp, cp in places
            ]
    ignored = tuple(sorted(key for key in data if key not in _KNOWN))
    for key in ignored:
        hint = did_you_mean(key, _KNOWN)
        notes += [f"{key}: {hint}"] if hint else []
    if reader.integer("vcp", 1) != 1:
        notes.append(f"vcp = {data['vcp']}: embedding and head are priced without it.")
    reader.raise_if_any()
    wasteful = []
    if stage == "0":
        wasteful.append("With default_dp_type ddp, every replica keeps all optimizer states.")
    if fixed["schedule"] == "gpipe":
        wasteful.append(
            "pipeline_type gpipe keeps the activations of all micro-batches; pipedream_flush those of pp."
        )
    workload = {"global_batch_size": batch, "optimizer": "adamw"}
    missing = {"micro_batch_size": f"it is {batch} / ({chunks} chunks · data-parallel ranks)"}
    return LaunchedRun(
        "galvatron",
        None,
        workload,
        fixed,
        None,
        (*notes, *ignored_note(ignored)),
        tuple(wasteful),
        ignored,
        missing,
        chunks,
        layerwise,
    )


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


def _stages(reader: Reader, layers: int, pp: int) -> list[int]:
    """Layers of every stage: as the file says, or evenly."""
    even, left = divmod(layers, pp)
    stages = _per_layer(reader, "pp_division") if "pp_division" in reader.data else [even] * pp
    if len(stages) != pp or sum(stages) != layers or (left and "pp_division" not in reader.data):
        reader.problem("pp_division", "-".join(map(str, stages)), f"{pp} stages of {layers} layers together")
        return [layers, *[0] * (pp - 1)]
    return stages
