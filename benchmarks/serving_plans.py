"""Serving plans to try launchers on: drawn over models, machines, traffic, formats and degrees of every pool.

What no replica fits, what keeps no promise, and what a launcher has no words for is passed over; the seed is fixed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import planner
from planner.errors import ExportError, PlannerError
from planner.export.hf_model import hf_model
from planner.export.serving import find_serving_exporter, serving_problems
from planner.export.serving.target import ServingTarget
from planner.serving.plan import ServePlan
from planner.serving.serve import serve
from planner.specs.serve_problem import ServeProblem
from planner.specs.speculation import Speculation
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic

__all__ = ["ARCHITECTURES", "draw_serving_plans"]

MODELS = (
    "llama2-7b", "llama2-70b", "llama3-8b", "llama3.1-70b", "llama3.1-405b", "mistral-7b-v0.1", "mistral-nemo-12b", "qwen2.5-14b",
    "qwen2.5-72b", "qwen3-0.6b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3",
)  # fmt: skip
CLUSTERS = ("h100-sxm:1x8", "h100-sxm:2x8", "h200:4x8", "b200:2x8", "a100-sxm-80gb:4x8", "h100-sxm:8x8")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip
"""``model_type`` → the class that engines look a model up by."""


def draw_serving_plans(exporter: str, count: int, seed: int = 7) -> Iterator[ServePlan]:
    """That many different plans that an exporter's launcher can run."""
    chosen, drawn, seen = find_serving_exporter(exporter), random.Random(f"{exporter}-{seed}"), set()
    for _ in range(200 * count):
        plan = _draw(exporter, drawn)
        if plan is None or plan.id in seen:
            continue
        try:
            target = ServingTarget(plan)
            if serving_problems(target, chosen) or not target.seats:
                continue
        except ExportError:
            continue
        seen.add(plan.id)
        yield plan
        if len(seen) == count:
            return


def _draw(exporter: str, drawn: random.Random) -> ServePlan | None:
    model, cluster = planner.load_model(drawn.choice(MODELS)), planner.load_cluster(drawn.choice(CLUSTERS))
    shape = hf_model(model)
    if shape is None or shape.config["model_type"] not in ARCHITECTURES:
        return None
    engine = drawn.choice(("vllm", "sglang", "trtllm")) if exporter == "dynamo" else exporter
    stack = load_stack("vllm" if engine == "llm-d" else engine)
    split = drawn.random() < 0.4
    fixed: dict[str, Any] = {"mode": "disaggregated" if split else "aggregated"}
    experts = any(block.moe for block in model.blocks.values())
    latent = all(block.attention is not None and block.attention.latent for block in model.blocks.values())
    for role in ("prefill.", "decode.") if split else ("",):
        tp = drawn.choice((1, 2, 4, 8, 8))
        fixed |= {f"{role}tp": tp, f"{role}pp": drawn.choice((1, 1, 2, 4))}
        if experts:
            dp = drawn.choice((1, 2, 4, 8))
            ep = drawn.choice((1, tp * dp))
            fixed |= {f"{role}dp": dp, f"{role}ep": ep, f"{role}etp": tp * dp // ep}
            fixed[f"{role}experts"] = drawn.choice(("gathered", "exchanged"))
        # Of vLLM, ranks that share prompts need a runner that does not start without an accelerator.
        if role == "prefill." and latent and engine == "sglang" and drawn.random() < 0.5:
            cp = drawn.choice((2, 4, 8))
            own = {"tp": 1, "pp": 1, "dp": 8 // cp, "cp": cp, "ep": 8, "etp": 1, "prompt_ranks": "all_gather"}
            fixed |= {f"{role}{name}": value for name, value in own.items()}
        if role != "decode.":
            fixed[f"{role}chunk_tokens"] = drawn.choice((1024, 2048, 8192, 16384))
    isl, osl = drawn.choice((128, 1024, 4000)), drawn.choice((32, 256, 1000))
    if isl + osl > model.max_seq_len:
        return None
    concurrency = drawn.choice((None, None, 8, 64)) if not split else None
    formats = (
        drawn.choice(
            (model.checkpoint, model.checkpoint, "fp8" if model.checkpoint == "bf16" else model.checkpoint)
        ),
    )
    caches = (drawn.choice(("bf16", "bf16", "fp8")),)
    drafts = None  # from the prompt: a draft model or modules would need a checkpoint of their own
    if drawn.random() < 0.15:
        fixed["draft_tokens"] = drawn.choice((2, 3, 5))
        drafts = Speculation("ngram", 0.4, (fixed["draft_tokens"],))
    try:
        traffic = Traffic(isl, osl, concurrency=concurrency, ttft_s=20.0, tpot_s=0.5)
        problem = ServeProblem(
            model, cluster, traffic, stack, formats, caches, (fixed["mode"],), fixed, speculation=drafts
        )
        return serve(problem, top=1).best
    except PlannerError:
        return None
