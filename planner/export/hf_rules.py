"""Rules that Transformers models bring to every launcher that trains them: Accelerate, the Trainer, DeepSpeed.

Kernels come in three sets: what PyTorch runs by itself, what ``torch.compile`` fuses, and Liger's (arXiv:2410.10989). Tensor
parallelism keeps activations whole between layers. Sources: Transformers 5.23 (``base_model_tp_plan``, ``use_liger_kernel``),
Accelerate 1.15 (``ParallelismConfig``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from planner.export.hf_model import HfModel, hf_model
from planner.export.target import Target
from planner.specs.model import Model
from planner.technique import Check, Context

__all__ = ["KERNELS", "KERNEL_CHOICES", "check_first", "hf_rules", "kernels_of", "shape_of"]

KERNELS: Mapping[tuple[str, str], str] = {
    ("eager", "log_softmax"): "plain",
    ("fused", "fused"): "compile",
    ("fused", "linear_fused"): "liger",
}
"""Element-wise and loss kernels → the set that has both."""

KERNEL_CHOICES: Mapping[str, str] = {
    "elementwise_kernel": "fused eager",
    "loss_kernel": "fused log_softmax linear_fused",
    "gradient_accumulation": "fused separate",
    "sequence_parallel": "false",
    "checkpoint_end": "whole early_stop",  # torch.utils.checkpoint stops early unless told not to
}


def hf_rules(ctx: Context) -> Iterable[Check]:
    """Rules on the model and its kernels."""
    mesh, knobs = ctx.mesh, ctx.knobs
    shape = hf_model(ctx.model)
    yield Check("no Transformers class that is known here has this model's shape", shape is not None)
    pair = (knobs.get("elementwise_kernel", "fused"), knobs.get("loss_kernel", "fused"))
    sets = " or ".join(f"{norm} norms with {loss} loss" for norm, loss in KERNELS)
    yield Check(f"kernels come in sets: {sets}", pair in KERNELS)
    yield Check("Transformers' tensor parallelism runs no pipelines", mesh.pp == 1)
    if shape is not None and not shape.tensor_parallel:
        yield Check(
            f"{shape.config['model_type']} has no plan for tensor parallelism (base_model_tp_plan)",
            mesh.tp == 1,
        )
    for block in ctx.model.blocks.values():
        if block.attention is not None:
            # Whole KV heads per rank: a weight that is cut inside a head cannot be viewed as heads again.
            yield Check("KV heads not divisible by tp", block.attention.kv_heads % mesh.tp == 0)


def kernels_of(knobs: Mapping[str, str]) -> str:
    """The set of kernels that a plan's choices mean: ``plain``, ``compile`` or ``liger``."""
    return KERNELS[knobs["elementwise_kernel"], knobs["loss_kernel"]]


def shape_of(model: Model) -> HfModel:
    """The Transformers model of a plan that keeps the rules."""
    shape = hf_model(model)
    assert shape is not None
    return shape


def check_first(target: Target) -> list[str]:
    """What to check before a script that builds a Transformers model starts."""
    found = []
    if target.plan.mesh["tp"] > 1:
        found.append(
            "Transformers cuts weights while it loads them: `export MODEL=FOLDER` with safetensors of this shape."
        )
    if kernels_of(target.knobs) == "liger":
        found.append("`pip show liger-kernel`: the plan counts on its fused loss.")
    return found
