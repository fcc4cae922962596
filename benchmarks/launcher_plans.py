"""Plans to try launchers on: drawn from every choice that a launcher names, over models, machines, batches and lengths.

A draw that breaks a rule of the planner or of the launcher is passed over; the seed is fixed: two runs try the same plans.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

import planner
from planner.errors import InvalidPlan, PlannerError
from planner.export import find_exporter
from planner.export.launchers import CHOICES, launcher
from planner.export.target import Target
from planner.export.torchtitan import stages_of
from planner.mesh import Mesh
from planner.pipeline.layout import layout_name
from planner.plans.plan import Plan
from planner.technique import SLOTS, Context, off

MODELS = (
    "llama2-7b", "llama2-70b", "llama3-8b", "llama3.1-70b", "llama3.1-8b", "mistral-7b-v0.1", "mistral-nemo-12b", "qwen2.5-14b",
    "qwen2.5-72b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3",
    "deepseek-v2-lite", "gpt2-xl", "gpt3-13b", "gpt-oss-20b", "smollm2-1.7b", "phi-4", "llama-13b", "llama-33b",
)  # fmt: skip
CLUSTERS = ("h100-sxm:8x8", "h100-sxm:1x8", "a100-sxm-80gb:4x8", "b200:4x8", "h200:16x8")
DEGREES = (1, 2, 4, 8)


def draw_plans(exporter: str, count: int, seed: int = 7) -> Iterator[Plan]:
    """That many different plans which keep the rules of an exporter's launcher."""
    name = find_exporter(exporter).launcher or "fsdp"  # what torchrun starts is a script over FSDP2
    drawn, seen = random.Random(f"{exporter}-{seed}"), set()
    for _ in range(400 * count):
        plan = _draw(name, drawn)
        if plan is None or plan.id in seen:
            continue
        seen.add(plan.id)
        yield plan
        if len(seen) == count:
            return


def _draw(name: str, drawn: random.Random) -> Plan | None:
    """One plan; None where the draw breaks a rule."""
    choices = {slot: values.split() for slot, values in CHOICES[name].items()}
    model, cluster = _model(drawn.choice(MODELS)), _cluster(drawn.choice(CLUSTERS))
    experts = any(block.moe for block in model.blocks.values())
    fixed: dict[str, Any] = {slot: drawn.choice(values) for slot, values in choices.items()}
    # Half of the draws keep what most plans have, so that combinations of the rest are found.
    for slot, value in (("recompute", "none"), ("optimizer_offload", "none"), ("zero_group", "full")):
        if slot in fixed and drawn.random() < 0.5:
            fixed[slot] = value
    if "parameter_offload" in fixed and drawn.random() < 0.7:
        fixed["parameter_offload"] = fixed["optimizer_offload"].partition("+")[0]
    fixed |= {degree: drawn.choice(DEGREES) for degree in ("tp", "cp", "pp")}
    for degree in ("tp", "cp", "pp"):
        if drawn.random() < 0.4:
            fixed[degree] = 1
    fixed |= {"ep": drawn.choice(DEGREES) if experts else 1, "etp": 1}
    if experts and fixed["ep"] == 1:
        fixed["etp"] = drawn.choice([1, fixed["tp"]])
    fixed["micro_batch_size"] = drawn.choice([1, 1, 2, 4])
    looped = {"interleaved": [2, 4], "breadth_first": [2, 4], "dualpipev": [2]}
    fixed["virtual_stages"] = drawn.choice(looped.get(str(fixed.get("schedule")), [1]))
    fixed["gradient_dtype"] = drawn.choice(
        ["fp32", "fp32", fixed["precision"] if fixed["precision"] in ("bf16", "fp16") else "fp32"]
    )
    if fixed.get("recompute") == "block":
        fixed["recompute_layers"] = drawn.choice([1, 2, 4])
    if fixed.get("recompute") == "modules":
        fixed["recompute_modules"] = "+".join(
            drawn.sample(["core_attn", "mlp", "moe", "shared_experts", "moe_act"], 2)
        )
    if fixed.get("zero_group") == "ranks":
        fixed["zero_group_ranks"] = drawn.choice([2, 4, 8, 16])
    if fixed["pp"] == 1:
        fixed |= {"virtual_stages": 1, "schedule": "1f1b"}
    if fixed["cp"] == 1:
        fixed["context"] = "p2p"
    fixed |= _stages(model, fixed["pp"], fixed["virtual_stages"], random.Random(str(fixed)))
    length = min(drawn.choice([2048, 4096, 8192, 16384]), model.max_seq_len)
    workload = planner.TrainWorkload(
        drawn.choice([64, 128, 256, 768]),
        length,
        optimizer=fixed["optimizer"],
        precisions=(fixed["precision"],),
    )
    if not _keeps_rules(name, model, cluster, workload, fixed):
        return None
    try:
        plan = planner.estimate(planner.Problem(model, cluster, workload, planner.load_stack(), fixed=fixed))
        return None if Target.of(plan).refused(launcher(name)) else plan
    except (InvalidPlan, PlannerError):
        return None


def _stages(model: Any, pp: int, virtual_stages: int, drawn: random.Random) -> dict[str, str]:
    """Layers of every virtual stage of some pipelines: fewer on the ends, what is left over on the first ones."""
    if pp == 1 or drawn.random() < 0.6:
        return {}
    ends = drawn.choice([0, 1, 1, 2, 3]), drawn.choice([0, 1, 1, 2, 3])
    stages = stages_of(model.n_layers, pp * virtual_stages, *ends)
    return {"pipeline_layout": layout_name(stages)} if min(stages) >= 0 else {}


def _keeps_rules(name: str, model: Any, cluster: Any, workload: Any, fixed: dict[str, Any]) -> bool:
    """Whether a draw keeps the launcher's rules; much faster than to price it first."""
    replicas, left = divmod(cluster.devices, fixed["tp"] * fixed["cp"] * fixed["pp"])
    if left or not replicas or workload.global_batch_size % (replicas * fixed["micro_batch_size"]):
        return False
    degrees = [fixed["tp"], fixed["cp"], replicas, fixed["pp"], fixed["ep"], fixed["etp"]]
    mesh = Mesh(*(np.array([float(degree)]) for degree in degrees))
    knobs = {slot: off(slot) for slot in SLOTS} | {knob: str(value) for knob, value in fixed.items()}
    batch = np.array([float(fixed["micro_batch_size"])])
    ctx = Context(model, cluster, workload, planner.load_stack(), mesh, batch, knobs)
    return all(np.all(check.ok) for check in launcher(name).valid(ctx))


@cache
def _model(name: str) -> Any:
    return planner.load_model(name)


@cache
def _cluster(name: str) -> Any:
    return planner.load_cluster(name)
