"""From a training row to the problem that the planner prices: model, cluster, job, stack, and the one plan that was run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from planner.errors import PlannerError
from planner.export.megatron import RECOMPUTE
from planner.specs.cluster import Cluster
from planner.specs.formats import FORMATS
from planner.specs.model import Model
from planner.specs.problem import Problem
from planner.specs.stack import Stack, stack_for
from planner.specs.workload import TrainWorkload
from planner.technique import SLOTS, discover
from planner.techniques.training.recompute.selective_recompute import read_modules
from planner.validation.architecture import model_of
from planner.validation.cells import WHERE_SILENT, Cells, note_units
from planner.validation.flags import Flags, kernel_knobs, read_flags
from planner.validation.machines import cluster_of, device_of
from planner.validation.table import Row, Unsupported

__all__ = ["Run", "run_of"]

_PRECISIONS = {
    "fp32": "fp32", "tf32": "tf32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8", "fp8_tensorwise": "fp8",
    "fp8_current": "fp8", "fp8_delayed": "fp8", "fp8_rowwise": "fp8_rowwise", "fp8_blockwise": "fp8", "fp8_subchannel": "fp8",
    "fp8_hybrid": "fp8", "fp8_mx": "mxfp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
_MODULES = {frozenset(modules): choice for choice, modules in RECOMPUTE.items()} | {
    frozenset({"mlp_act"}): "act",
}
_PER_OPERATOR = "per_op_sac"
_SCHEDULES = {"zero_bubble": "zb_h1", "zb": "zb_h1"}  # by the names of others
_LOSS_COMPILED = "2025-04"
_MODULES_OF_AUTOMODEL = r"\bTE \+ DeepEP\b"
_PIPELINES_SYNCHRONISED_ONCE = "2025-10-08"
_OFFLOADS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "optimizer:0": {},
    "optimizer": {"optimizer_offload": "cpu"},
    "optimizer:1": {"optimizer_offload": "cpu"},
    "optimizer:1.0": {"optimizer_offload": "cpu"},
    "optimizer:100%": {"optimizer_offload": "cpu"},
    "optimizer+params": {"optimizer_offload": "cpu", "parameter_offload": "cpu"},
    "params": {"parameter_offload": "cpu"},
    "activations": {"activation_offload": "cpu"},
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a row describes.

    Attributes:
        row: the row.
        problem: the run as the planner sees it; its ``fixed`` names the plan.
        defaults: columns whose empty cell took its default.
        otherwise: knobs that take the place of the plan's, one set after the other, while it does not fit in memory: what the row
            leaves open about recompute.
    """

    row: Row
    problem: Problem
    defaults: tuple[str, ...]
    otherwise: tuple[Mapping[str, Any], ...] = ()

    @property
    def plan_key(self) -> tuple[Any, ...]:
        """What tells this plan from others for the same job."""
        workload = self.problem.workload
        return (tuple(sorted(self.problem.fixed.items())), workload.seq_len, workload.global_batch_size)


def run_of(row: Row) -> Run:
    """The run of a row.

    Raises:
        Unsupported: a mandatory cell is empty, a cell cannot be read, or no technique describes what was run.
    """
    cells = Cells(row, device_of(row.text("accelerator")))
    cells.check_mandatory()
    flags = read_flags(row.text("other_flags"))
    model, cluster = model_of(cells, flags), cluster_of(cells)
    stack = _stack(_framework(cells, flags), row.text("framework_version"), row.text("measured_date"))
    if not row.text("framework"):
        cells.default("framework")
    note_units(cells)
    fixed = _fixed(cells, flags, model, cluster)
    if fixed.get("sequence_parallel") == "true":  # which kind, the stack says
        fixed["sequence_parallel"] = stack.knobs.get("sequence_parallel", "true")
    if _compiles_loss(cells, flags):
        fixed = {"loss_kernel": cells.default("(compiled loss)")} | fixed
    for knob, default in (("gradient_dtype", "(gradients)"), ("loss_kernel", "(loss)")):
        if knob not in {**stack.knobs, **fixed}:
            fixed[knob] = cells.default(default)
    if cells.framework.startswith("pytorch fsdp2") and not flags.says(r"torch\.compile|float8|\bTE\b"):
        fixed = {"elementwise_kernel": cells.default("(elementwise)")} | fixed
    if cells.of_container and stack.name == "nemo-2024" and flags.says(r"\bsft\b"):
        fixed = {"optimizer": cells.default("(optimizer)")} | fixed
    seq_len, batch = cells.whole("seq_len"), cells.whole("global_batch")
    workload = _workload(batch, seq_len, fixed.get("optimizer", "adamw"), fixed["precision"])
    otherwise: tuple[Mapping[str, Any], ...] = ()
    if "recompute" in cells.used:
        otherwise = tuple({"recompute": choice} for choice in WHERE_SILENT[1:])
    elif _some_layers(cells):
        otherwise = tuple(_share_of_layers(model, quarters) for quarters in (2, 3, 4))
    return Run(row, Problem(model, cluster, workload, stack, fixed), tuple(cells.used), otherwise)


def _framework(cells: Cells, flags: Flags) -> str:
    """The framework's name. Modules of Transformer Engine and DeepEP under FSDP2 are NeMo Automodel's."""
    if not (cells.framework.startswith("pytorch fsdp2") and flags.says(_MODULES_OF_AUTOMODEL)):
        return cells.framework
    return f"NeMo Automodel {'PyTorch attention' if flags.says(r'FlexAttn|TorchSDPA') else ''}".strip()


def _synchronised_always(cells: Cells) -> bool:
    """Whether a pipeline gathers and reduces in every micro-batch: NeMo Automodel's mixtures until its pull request 574, of
    8 October 2025, which shard the modules inside a stage, so that the schedule does not know of it."""
    sharded_inside = re.search(_MODULES_OF_AUTOMODEL, cells.row.text("other_flags")) is not None
    return sharded_inside and cells.since < _PIPELINES_SYNCHRONISED_ONCE


def _compiles_loss(cells: Cells, flags: Flags) -> bool:
    """Whether torch.compile has the loss, too. That of a sharded vocabulary is made of DTensor's operators, compiled or not."""
    compiled = flags.says(r"torch\.compile") and flags.values.get("torch.compile", "").lower() != "false"
    fsdp2 = cells.framework.startswith("pytorch fsdp2")
    return compiled and fsdp2 and cells.whole("tp") == 1 and cells.since >= _LOSS_COMPILED


def _some_layers(cells: Cells) -> bool:
    """Whether ``selective`` means whole layers, not Megatron's attention: so PyTorch's wrappers have it."""
    return cells.text("recompute") == "selective" and cells.framework.startswith("pytorch fsdp")


def _share_of_layers(model: Model, quarters: int) -> Mapping[str, Any]:
    """Recompute of so many quarters of the layers."""
    if quarters == 4:
        return {"recompute": "full"}
    return {"recompute": "block", "recompute_layers": max(model.n_layers * quarters // 4, 1)}


@lru_cache(maxsize=256)
def _stack(framework: str, version: str, date: str) -> Stack:
    return stack_for(framework, version, date)


@lru_cache(maxsize=4096)
def _workload(batch: int, seq_len: int, optimizer: str, precision: str) -> TrainWorkload:
    try:
        return TrainWorkload(batch, seq_len, optimizer=optimizer, precisions=(precision,))
    except PlannerError as error:
        raise Unsupported(str(error)) from None


def _fixed(cells: Cells, flags: Flags, model: Model, cluster: Cluster) -> dict[str, Any]:
    """The plan's knobs."""
    tp, pp, cp, vpp = (cells.whole(name) for name in ("tp", "pp", "cp", "vpp"))
    replicas, left = divmod(cluster.devices, tp * pp * cp)
    if left:
        raise Unsupported(f"{cluster.devices} devices do not divide among tp·pp·cp = {tp * pp * cp}")
    micro_batch, batch = cells.whole("micro_batch"), cells.whole("global_batch")
    if batch % (replicas * micro_batch):
        raise Unsupported(
            f"a global batch of {batch} is no whole number of micro-batches of {micro_batch} on {replicas} ranks"
        )
    mixture = any(block.moe for block in model.blocks.values())
    chunks = vpp if pp > 1 else 1
    fixed: dict[str, Any] = {
        "tp": tp, "pp": pp, "cp": cp, "micro_batch_size": micro_batch, "virtual_stages": chunks,
        "ep": cells.whole("ep") if mixture else 1, "etp": cells.whole("etp") if mixture else 1,
        "schedule": _schedule(cells.row.text("schedule"), pp, chunks), "precision": _precision(cells.dtype),
    }  # fmt: skip
    if tp > 1:
        fixed["sequence_parallel"] = "true" if cells.truth("sequence_parallel") else "false"
    fixed |= _states(cells, cluster, replicas * cp, tp * cp)
    if _some_layers(cells):
        fixed |= _share_of_layers(model, 1)
    else:
        fixed |= _recompute(cells.text("recompute"), model, pp, chunks)
    fixed |= _offload(cells.text("offload"))
    fixed |= kernel_knobs(flags, tp=tp, cp=cp)
    if mixture and "dispatch" not in fixed and (how := cells.default("(dispatch)")):
        fixed["dispatch"] = how
    if mixture and "fake gate" in cells.row.text("notes"):  # NeMo Automodel's FakeBalancedGate
        fixed["routing"] = "neighbours"
    if pp > 1 and "pipeline-layout" in flags.values:
        fixed["pipeline_layout"] = flags.values["pipeline-layout"]
    if "adaptation" in fixed and (targets := cells.default("(adapters)")):
        fixed.setdefault("adapter_targets", targets)
    return fixed


def _schedule(text: str, pp: int, chunks: int) -> str:
    """The schedule that a row names; of 1F1B the interleaved one where stages have several chunks."""
    name = text.lower().replace("-", "_").replace(" ", "_")
    if pp == 1 or name in ("", "1f1b", "interleaved", "interleaved_1f1b", "1f1b_interleaved"):
        return "interleaved" if chunks > 1 else "1f1b"
    name = _SCHEDULES.get(name, name)
    if all(name not in t.choices for t in discover("training").values() if t.slot == "schedule"):
        raise Unsupported(f"schedule {text!r}: not modelled")
    return name


def _precision(dtype: str) -> str:
    if dtype not in _PRECISIONS:
        raise Unsupported(f"dtype {dtype!r}: not modelled")
    assert _PRECISIONS[dtype] in FORMATS
    return _PRECISIONS[dtype]


def _states(cells: Cells, cluster: Cluster, replicas: int, stride: int) -> dict[str, Any]:
    """What is sharded over the data-parallel ranks, and over how many of them.

    Args:
        cells: the row.
        cluster: its machines.
        replicas: copies of a weight.
        stride: ranks between two neighbouring copies of a weight, context parallelism aside.
    """
    stage, stated = cells.zero_stage, cells.row.text("zero_stage").lower()
    if stage > 3:
        raise Unsupported(f"zero_stage is {stage}, none of 0 to 3")
    printed = cells.row.text("sharding_as_printed").lower() or stated
    fsdp = printed.startswith("fsdp") and "megatron" not in cells.framework
    if fsdp and stage > 1 and cells.whole("pp") > 1 and not _synchronised_always(cells):
        stage = 1  # PyTorch's pipelines keep weights gathered and gradients whole until the last micro-batch
    choice: dict[str, Any] = {
        "zero_stage": "fsdp" if stage == 3 and fsdp else str(stage),
        "zero_group": "full",
    }
    group = cells.row.text("shard_group").lower()
    if not group:  # hybrid sharding is PyTorch's word for a node's ranks
        group = "node" if stated.startswith("hsdp") else cells.text("shard_group")
    if not group or stage == 0:
        return choice
    domain = cluster.tiers[0].size
    inside = max(domain // stride, 1) if len(cluster.tiers) > 1 or domain < cluster.devices else replicas
    size = inside if group == "node" else int(group) if group.isdecimal() and len(group) < 10 else 0
    if size >= replicas:
        return choice
    if size == 1:
        return {"zero_stage": "0", "zero_group": "full"}
    if size == inside:
        return choice | {"zero_group": "node"}
    if size == 0 or replicas % size:
        raise Unsupported(f"shard_group {group!r} does not divide {replicas} replicas")
    return choice | {"zero_group": "ranks", "zero_group_ranks": size}


def _recompute(text: str, model: Model, pp: int, chunks: int) -> dict[str, Any]:
    kind, _, detail = text.partition(":")
    if text in ("none", "full", "selective"):
        return {"recompute": text}
    if kind == "block" and detail.isdecimal() and len(detail) < 6 and int(detail) > 0:
        return {"recompute": "block", "recompute_layers": int(detail) * chunks}
    if detail == "every_other_layer":
        return {"recompute": "block", "recompute_layers": max(-(-model.n_layers // pp) // 2, 1)}
    if detail == _PER_OPERATOR:
        return {"recompute": "per_op"}
    choice = _MODULES.get(frozenset(detail.split("+"))) if kind == "selective" else None
    if choice is not None:
        return {"recompute": choice}
    try:
        return {"recompute": "modules", "recompute_modules": read_modules(detail)}
    except ValueError:
        raise Unsupported(f"recompute {text!r}: not modelled") from None


def _offload(text: str) -> Mapping[str, Any]:
    kind, _, layers = text.partition(":")
    if kind == "activations" and layers.isdecimal() and len(layers) < 6 and int(layers) > 0:
        return {"activation_offload": "cpu", "activation_offload_layers": int(layers)}
    if "=" in text:  # as our own measuring scripts write what published tables have no word for
        return dict(_knob(part, text) for part in text.split(";"))
    if text not in _OFFLOADS:
        raise Unsupported(f"offload {text!r}: not modelled")
    return _OFFLOADS[text]


def _knob(part: str, text: str) -> tuple[str, str]:
    name, _, value = part.strip().partition("=")
    if name.removesuffix("_layers") not in SLOTS or not name.removesuffix("_layers").endswith("_offload"):
        raise Unsupported(f"offload {text!r}: not modelled")
    return name, value
