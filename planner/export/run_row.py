"""A plan as a row of a table of training runs: the columns that ``planner validate`` and ``planner calibrate`` read.

The measuring script of an exported folder fills in what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.target import Target

__all__ = ["run_row"]

_MODULES = {
    "norm": "layernorm", "act": "moe_act", "norm+act": "layernorm+moe_act", "norm+mla_up": "layernorm+mla_up_proj",
    "mlp": "mlp+moe",
}  # fmt: skip


def run_row(target: Target, framework: str, version: str) -> dict[str, Any] | None:
    """Cells of the plan's row, by column; cells of what is measured are left out. None where layers differ: a row says one
    strategy and one mesh of all of them.

    Args:
        target: the plan.
        framework, version: as the columns of these names have them; they choose the software stack.
    """
    plan, model, knobs = target.plan, target.model, target.knobs
    if target.layers_differ:
        return None
    mesh, device = plan.mesh, target.cluster.device
    row: dict[str, Any] = {"row_id": f"plan-{plan.id}", "source": "own measurement", "family": "own"}
    row |= _architecture(target)
    row |= {
        "seq_len": target.workload.seq_len, "accelerator": device.name, "n_devices": plan.devices,
        "devices_per_node": target.nodes()[1],
    }  # fmt: skip
    row |= {name: mesh[name] for name in ("dp", "tp", "cp", "pp", "ep", "etp")}
    row |= {
        "sequence_parallel": knobs["sequence_parallel"] if mesh["tp"] > 1 else "false",
        "vpp": plan.knobs["virtual_stages"],
        "zero_stage": 3 if knobs["zero_stage"] == "fsdp" else knobs["zero_stage"],
        "sharding_as_printed": "FSDP" if knobs["zero_stage"] == "fsdp" else "",
        "shard_group": "node" if knobs["zero_group"] == "node" else "",
        "micro_batch": plan.knobs["micro_batch_size"], "global_batch": target.workload.global_batch_size,
        "grad_accum": plan.micro_batches, "recompute": _recompute(target),
        "schedule": {"1f1b": "1f1b", "interleaved": "interleaved_1f1b"}.get(knobs["schedule"], knobs["schedule"]),
        "dtype": knobs["precision"], "offload": _offload(target), "other_flags": "; ".join(_flags(target)),
        "framework": framework, "framework_version": version, "score_for": "time+memory",
    }  # fmt: skip
    return {column: value for column, value in row.items() if value not in ("", None)} | {"model": model.name}


def _architecture(target: Target) -> dict[str, Any]:
    """Sizes of the model; what columns cannot say is taken from the shipped model of that name."""
    model = target.model
    blocks = [model.blocks[name] for name, repeat in model.layers for _ in range(repeat)]
    attention = next((block.attention for block in blocks if block.attention), None)
    mlp = next((block.mlp for block in blocks if block.mlp), None)
    moe = next((block.moe for block in blocks if block.moe), None)
    row: dict[str, Any] = {
        "n_layers": len(blocks), "hidden": model.hidden, "vocab": model.vocab,
        "tied_embeddings": str(model.tied_embeddings).lower(),
    }  # fmt: skip
    if attention is not None:
        row |= {"n_heads": attention.heads, "n_kv_heads": attention.kv_heads, "head_dim": attention.value_dim}
    part = mlp or moe
    row["mlp"] = "swiglu" if part is not None and part.gated else "gelu"
    row["ffn_hidden"] = mlp.ffn if mlp else moe.expert_ffn if moe else None
    if moe is not None:
        row |= {
            "n_experts": moe.experts, "top_k": moe.top_k, "expert_ffn_hidden": moe.expert_ffn,
            "moe_layers": sum(block.moe is not None for block in blocks),
            "n_shared_experts": moe.shared_ffn // moe.expert_ffn,
        }  # fmt: skip
    return row


def _recompute(target: Target) -> str:
    choice = target.knobs["recompute"]
    if choice in _MODULES:
        return f"selective:{_MODULES[choice]}"
    if choice == "modules":
        return f"selective:{target.knobs['recompute_modules']}"
    if choice == "per_op":
        return "selective:per_op_sac"
    if choice == "block":
        return f"block:{int(target.knobs['recompute_layers']) // int(target.knobs['virtual_stages'])}"
    return "full" if choice == "partitioned" else choice


def _offload(target: Target) -> str:
    """What is offloaded, in the words of published tables; knobs and values where these have none."""
    slots = ("optimizer_offload", "parameter_offload", "activation_offload")
    moved = {slot: target.knobs[slot] for slot in slots if target.knobs[slot] != "none"}
    layers = {name: target.knobs[name] for name in ("activation_offload_layers",) if name in target.knobs}
    if not layers and set(moved.values()) <= {"cpu"} and tuple(moved) in _OFFLOADED:
        return _OFFLOADED[tuple(moved)]
    return "; ".join(f"{slot}={value}" for slot, value in (moved | layers).items())


_OFFLOADED: Mapping[tuple[str, ...], str] = {
    (): "none",
    ("optimizer_offload",): "optimizer",
    ("parameter_offload",): "params",
    ("optimizer_offload", "parameter_offload"): "optimizer+params",
    ("activation_offload",): "activations",
}


def _flags(target: Target) -> list[str]:
    """Launcher flags beyond the columns, in the words that the column takes."""
    knobs = target.knobs
    flags = [f"attention-backend={'unfused' if knobs['attention_kernel'] == 'eager' else 'flash'}"]
    if knobs["optimizer"] in ("muon", "sgd"):
        flags.append(f"optimizer={knobs['optimizer']}")
    if knobs["loss_kernel"] == "fused":
        flags.append("cross-entropy-loss-fusion=true")
    if knobs["gradient_accumulation"] == "separate":
        flags.append("no-gradient-accumulation-fusion=true")
    if knobs["tensor_overlap"] == "chunked":
        flags.append("tp-comm-overlap=true")
    if knobs["context"] == "a2a" and target.plan.mesh["cp"] > 1:
        flags.append("cp-comm-type=a2a")
    if knobs["pipeline_layout"] != "even":
        flags.append(f"pipeline-layout={knobs['pipeline_layout']}")
    return flags
