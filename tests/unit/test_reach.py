"""Every technique that the default search leaves aside is chosen where it wins, and the account of the plan names it.

Each problem is one that the technique's paper is about. ``explore`` opens choices that hardly ever win, ``allowed`` those that
change the result of training; optimizers and adaptations are what the job asks for, and win where nothing else fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from planner import Problem, TrainWorkload, examine, load_cluster, load_model, load_stack, search
from planner.errors import Infeasible
from planner.report.account import byte_tree, second_tree
from planner.solve.replay import replay

GB = 1e9


@dataclass(frozen=True)
class Case:
    """A problem, and the choice that wins it.

    ``by``: the technique that the plan's account of seconds or bytes must name (messages between stages are part of the
    schedule's bubble); ``host_gb``: host memory of the one device;
    ``nvme``: its drives, ``cxl``: its CXL memory, GB and GB/s.
    """

    choice: str
    by: str
    model: str
    cluster: str
    batch: int
    seq: int
    fixed: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    host_gb: float = 0.0
    nvme: tuple[float, float] | None = None
    cxl: tuple[float, float] | None = None
    allowed: tuple[str, ...] = ()
    explore: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    instead: dict[str, Any] | None = None  # the job without it: nothing fits

    def problem(self) -> Problem:
        cluster = replace(load_cluster(self.cluster), name=self.cluster)
        if self.host_gb:
            cluster = replace(cluster, host_memory_bytes=self.host_gb * GB)
        if self.nvme is not None:
            size, rate = self.nvme
            cluster = replace(cluster, nvme_bytes=size * GB, nvme_bytes_per_s=rate * GB)
        if self.cxl is not None:
            size, rate = self.cxl
            cluster = replace(cluster, cxl_bytes=size * GB, cxl_bytes_per_s=rate * GB)
        workload = TrainWorkload(self.batch, self.seq, **self.job)
        return Problem(
            load_model(self.model), cluster, workload, load_stack(), fixed=self.fixed, allowed=self.allowed, explore=self.explore,
            forbidden=self.forbidden,
        )  # fmt: skip


SLOW = "examples/slow_network.toml"
K = {"loss_kernel": "fused", "gradient_accumulation": "fused"}
FLAT = {**K, "tp": 1, "pp": 1, "cp": 1}
ON_DEVICE = {"optimizer_offload": "none", "activation_offload": "none", "parameter_offload": "none"}
PLAIN = {"tp": 1, "pp": 1, "cp": 1, "loss_kernel": "fused", "gradient_accumulation": "fused"}
ONE_CARD = {
    "gradient_dtype": "fp16",
    "loss_kernel": "fused",
    "gradient_accumulation": "fused",
    "context": "p2p",
}
CASES = [
    # 65B in 8 × 24 GB: Lv et al. 2024 (arXiv:2306.09782), abstract; AdamW does not fit.
    Case("optimizer=lomo", "lomo", "llama-65b", "rtx-3090:1x8", 8, 512, {"gradient_dtype": "fp16", "cp": 1, "pp": 1},
         {"optimizer": "lomo", "precisions": ("fp16",)}, instead={"optimizer": "adamw"}),
    Case("optimizer=adalomo", "adalomo", "llama-65b", "rtx-3090:1x8", 8, 512, {"gradient_dtype": "fp16", "cp": 1, "pp": 1},
         {"optimizer": "adalomo", "precisions": ("fp16",)}),
    # 7B in one 80 GB card, states and all: where AdamW's do not fit, these do (the sizes are those of their papers).
    *(
        Case(f"optimizer={name}", by, "llama-7b", cluster, 1, 512, {**K, **ON_DEVICE, "gradient_dtype": "bf16"},
             {"optimizer": name}, instead={"optimizer": "adamw"})
        for name, by, cluster in (
            ("adam8bit", "adam8bit", "a100-sxm-80gb:1x1"), ("adafactor", "adafactor", "a100-sxm-80gb:1x1"),
            ("adamw_fp8", "fp8_lm", "h100-sxm:1x1"), ("lion", "lion", "h100-sxm:1x1"), ("muon", "muon", "h100-sxm:1x1"),
            ("lars", "layerwise", "h100-sxm:1x1"), ("adamw_16bit", "lightseq2", "h100-sxm:1x1"),
        )
    ),
    # The default search: formats that the device multiplies faster, and what memory asks for.
    Case("precision=fp8", "mxfp8_nvfp4", "llama3-8b", "h100-sxm:1x8", 64, 8192, K, {"precisions": ("bf16", "fp8")}),
    Case("precision=mxfp8", "mxfp8_nvfp4", "llama3-8b", "b200-sxm:1x8", 64, 8192, K, {"precisions": ("bf16", "mxfp8")}),
    Case("recompute=norm+act", "selective_recompute", "llama3-70b", "h100-sxm:8x8", 256, 8192, K),
    Case("recompute=block", "chen_ckpt", "llama3-8b", "a100-sxm-40gb:1x8", 8, 98304,
         {**K, **ON_DEVICE, "tp": 8, "pp": 1, "cp": 1}),
    Case("activation_offload=cpu", "vdnn", "llama3-8b", "h100-sxm:1x8", 8, 131072,
         {**K, "tp": 8, "pp": 1, "cp": 1, "recompute": "none"}),
    Case("optimizer_offload=cpu", "zero_offload", "gpt3-13b", "v100-sxm2-32gb:1x1", 64, 1024, {**K, "gradient_dtype": "fp16"},
         {"precisions": ("fp16",)}, host_gb=1500),
    Case("parameter_offload=cpu", "zero_infinity", "llama-33b", "rtx-3090:1x4", 32, 512, {**K, "gradient_dtype": "fp16"},
         {"precisions": ("fp16",)}, host_gb=512),
    Case("zero_stage=2", "zero2", "gpt3-13b", "a100-sxm-80gb:1x8", 8, 2048, {**FLAT, **ON_DEVICE}),
    Case("zero_stage=3", "zero3", "gpt3-13b", "a100-sxm-40gb:1x8", 64, 2048, {**FLAT, **ON_DEVICE}),
    Case("zero_stage=fsdp", "fsdp", "gpt3-13b", "a100-sxm-40gb:1x8", 64, 2048, {**FLAT, **ON_DEVICE}, explore=("zero_stage=*",)),
    Case("zero_group=node", "hsdp", "gpt3-2.7b", SLOW, 64, 2048, {**FLAT, "zero_stage": 3}),
    # Heads enough for all ranks, and NVLink: all-to-alls (arXiv:2309.14509); 25 heads on 8 ranks: a ring (arXiv:2310.01889); more
    # ranks than a node and than heads of keys: both (arXiv:2405.07719).
    *(
        Case(f"context={choice}", by, model, cluster, batch, seq, {**K, "cp": cp, "tp": 1, "pp": 1, "micro_batch_size": 1})
        for choice, by, model, cluster, batch, seq, cp in (
            ("a2a", "ulysses", "llama2-7b", "a100-sxm-80gb:1x8", 8, 32768, 8),
            ("p2p", "ring_attention", "gpt2-xl", "a100-sxm-80gb:1x8", 8, 65536, 8),
            ("a2a+p2p", "usp", "llama3-8b", "a100-sxm-80gb:4x8", 4, 131072, 32),
        )
    ),
    Case("tensor_overlap=chunked", "async_tp", "llama2-70b", "h100-sxm:4x8", 64, 4096, {**K, "tp": 8}),
    Case("sequence_parallel=true", "megatron_sp", "llama2-70b", "h100-sxm:4x8", 64, 4096, {**K, "tp": 8}),
    Case("sequence_parallel=gathered", "kept_gather", "llama2-70b", "h100-sxm:4x8", 64, 4096, {**K, "tp": 8, "recompute": "full"},
         explore=("sequence_parallel=*",)),
    # A vocabulary of 256,000: logits are what memory and time go to (arXiv:2410.10989).
    Case("loss_kernel=linear_fused", "fused_cross_entropy", "gemma2-9b", "a100-sxm-80gb:2x8", 64, 8192,
         {"gradient_accumulation": "fused"}, explore=("loss_kernel=*",)),
    # 7B in one 48 GB card: Li et al. 2023 (arXiv:2310.07147), abstract.
    Case("optimizer=lion_int8", "qft", "llama-7b", "a6000:1x1", 1, 512, {"optimizer_offload": "none"},
         {"optimizer": "lion_int8"}, instead={"optimizer": "lion"}),
    # 175B on one consumer card with 18 GB in use: Wang et al. 2025 (arXiv:2503.12668), abstract.
    Case("optimizer=mezo", "zo2", "gpt3-175b", "rtx-4090:1x1", 1, 2048, {}, {"optimizer": "mezo"}, host_gb=1500,
         instead={"optimizer": "adamw"}),
    # 65B in one 48 GB card: Dettmers et al. 2023 (arXiv:2305.14314), abstract; LoRA alone does not fit.
    Case("adaptation=qlora", "qlora", "llama-65b", "a6000:1x1", 1, 1024, {"adaptation": "qlora"}),
    Case("adaptation=alphatuning", "alphatuning", "llama-65b", "a6000:1x1", 1, 1024, {"adaptation": "alphatuning"}),
    # 13B on one V100: Ren et al. 2021 (arXiv:2101.06840), abstract.
    Case("optimizer_offload=cpu+gradients", "zero_offload_gradients", "gpt3-13b", "v100-sxm2-32gb:1x1", 64, 1024,
         {"gradient_dtype": "fp16", "gradient_accumulation": "fused", "loss_kernel": "fused"}, {"precisions": ("fp16",)},
         host_gb=1500, explore=("optimizer_offload=cpu+gradients",)),
    # States that only fit the host, and a host slower than the link: Maurya et al. 2024 (arXiv:2410.21316).
    Case("optimizer_offload=interleaved", "deep_optimizer_states", "gpt3-6.7b", "a100-sxm-80gb:1x1", 64, 1024,
         {**PLAIN, "context": "p2p"}, host_gb=300, explore=("optimizer_offload=interleaved",)),
    # 175B on one consumer card, states that exceed the host: Liao et al. 2024 (arXiv:2403.06504), abstract.
    *(
        Case(choice, by, "gpt3-175b", "rtx-4090:1x1", 32, 1024, ONE_CARD, {"precisions": ("fp16",)}, host_gb=256,
             nvme=(12000, 36), explore=("all",))
        for choice, by in (("optimizer_offload=nvme+overlapped", "fuyou"), ("parameter_offload=nvme", "zero_infinity_nvme"))
    ),
    # The same without an update beside the backward: Rajbhandari et al. 2021 (arXiv:2104.07857), one node and its drives.
    Case("optimizer_offload=nvme", "zero_infinity_states", "gpt3-175b", "rtx-4090:1x1", 32, 1024, ONE_CARD,
         {"precisions": ("fp16",)}, host_gb=256, nvme=(12000, 36), explore=("optimizer_offload=nvme", "parameter_offload=nvme")),
    # Activations that exceed host memory as well: Bae et al. 2021 (FAST), a host that is busy with other work.
    Case("activation_offload=nvme", "flashneuron", "gpt3-13b", "rtx-4090:1x1", 32, 1024, ONE_CARD, {"precisions": ("fp16",)},
         host_gb=64, nvme=(12000, 36), explore=("all",)),
    # States that DRAM has room for and no more, or not for all of them; the rest streams from CXL memory: Liaw and Chen 2025
    # (arXiv:2507.03305), abstract. Without drives.
    *(
        Case(choice, by, "gpt3-13b", "rtx-4090:1x1", 32, 1024, ONE_CARD, {"precisions": ("fp16",)}, host_gb=host_gb,
             nvme=(0.001, 1), cxl=(512, 25), explore=("all",))
        for choice, by, host_gb in (
            ("activation_offload=cxl", "cxl_offload", 190), ("parameter_offload=cxl", "cxl_weights", 190),
            ("optimizer_offload=cpu+cxl", "cxl_states", 120),
        )
    ),
    # States on a host that keeps up with the backward: Sun et al. 2022 (SC), abstract.
    Case("optimizer_offload=cpu+overlapped", "stronghold", "gpt3-13b", "rtx-4090:1x1", 32, 1024, ONE_CARD,
         {"precisions": ("fp16",)}, host_gb=768, explore=("all",)),
    # One micro-batch per step, and a gradient too many: Fang et al. 2021 (arXiv:2108.05818).
    Case("gradient_accumulation=in_place", "mixed_precision", "gpt3-2.7b", "a100-sxm-40gb:1x1", 8, 1024,
         {"gradient_dtype": "bf16", "loss_kernel": "fused", "context": "p2p"}, explore=("all",)),
    # Agreement every hundreds of steps over 100 Gb/s: Sun et al. 2024 (arXiv:2401.16265).
    Case("synchronisation=co2", "co2", "gpt3-2.7b", SLOW, 64, 2048, {**PLAIN, "zero_stage": 1}, allowed=("staleness",)),
    *(
        Case(f"synchronisation={name}", name, "gpt3-2.7b", SLOW, 64, 2048,
             {**PLAIN, "zero_stage": 1, "synchronisation": name}, allowed=("staleness",))
        for name in ("diloco", "noloco")
    ),
    # Many replicas behind slow links, and nothing to hide a whole reduction behind: Lian et al. 2017 (arXiv:1705.09056). It needs
    # replicated states.
    *(
        Case(choice, "neighbours", "gpt3-1.3b", "rtx-4090:32x1", 64, 512, PLAIN, allowed=("staleness",),
             forbidden=("co2", "diloco", "noloco"))
        for choice in ("synchronisation=neighbours", "zero_stage=0")
    ),
    # Gradients over a slow network: Wang et al. 2023 (arXiv:2306.10209), Vogels et al. 2019 (arXiv:1905.13727).
    Case("compression=qgz", "zeropp", "gpt3-2.7b", SLOW, 256, 2048, PLAIN, allowed=("lossy",)),
    # A tenth of the elements in a few bits, a step late: Wang et al. 2023 (ICML); both copies of a tied embedding and their
    # replicas over a slow network: Song et al. 2023 (arXiv:2301.09830).
    Case("compression=cocktail", "cocktail_sgd", "gpt3-1.3b", SLOW, 32, 2048,
         {**PLAIN, "zero_stage": 0, "synchronisation": "none"}, allowed=("lossy", "staleness")),
    Case("compression=fused_embedding", "optimus_cc", "gpt3-2.7b", SLOW, 64, 2048,
         {**PLAIN, "pp": 8, "zero_stage": 0, "schedule": "1f1b", "pipeline": "stages"}, explore=("all",)),
    Case("compression=int8", "bagua", "gpt3-1.3b", SLOW, 32, 2048, {**PLAIN, "zero_stage": 0}, allowed=("lossy",),
         forbidden=("powersgd",)),
    Case("compression=low_rank", "powersgd", "gpt3-1.3b", SLOW, 32, 2048, {**PLAIN, "zero_stage": 0}, allowed=("lossy",)),
    # A model whose gathers in the backward cross nodes, without room for a copy per node: arXiv:2306.10209, section 3.2.
    Case("zero_group=secondary", "hpz", "gpt3-2.7b", SLOW, 32, 2048, {**PLAIN, "zero_stage": 3, "micro_batch_size": 1,
         "zero_group": "secondary"}, explore=("all",)),
    # 64 tensor ranks and 96 heads: a cube is what divides them best (Bian et al. 2021, arXiv:2105.14450, on 64 devices).
    Case("tensor=3d", "tp_3d", "gpt3-175b", "gb200-nvl72:16x4", 64, 2048,
         {"tp": 64, "sequence_parallel": "false", "context": "p2p", "pipeline": "stages", "loss_kernel": "fused",
          "gradient_accumulation": "fused", "tensor_overlap": "none"}, explore=("all",)),
    # The same on a square, and on two layers of one, of the scale-up domain's ranks: arXiv:2104.05343, arXiv:2105.14500.
    *(
        Case(f"tensor={choice}", by, "gpt3-175b", cluster, 64, 2048,
             {**K, "tp": tp, "sequence_parallel": "false", "context": "p2p", "pipeline": "stages", "tensor_overlap": "none"},
             explore=(f"tensor={choice}",))
        for choice, by, cluster, tp in (
            ("2d", "optimus_2d", "gb200-nvl72:16x4", 64), ("2.5d", "tesseract_25d", "gb200-nvl72:8x4", 32),
        )
    ),
    # What came before sequence parallelism: messages between stages that cross nodes whole on every tensor rank (Narayanan et al.
    # 2021, arXiv:2104.04473, section 4.1), and checkpoints that every tensor rank keeps whole (arXiv:1910.02054, section 6.1).
    Case("pipeline=scatter_gather", "megatron_interleaved", "gpt3-13b", "a100-sxm-40gb:4x8", 32, 2048,
         {**K, "tp": 8, "cp": 1, "pp": 4, "sequence_parallel": "false", "micro_batch_size": 1}, explore=("pipeline=*",)),
    Case("recompute=partitioned", "zero_r", "llama2-13b", "a100-sxm-40gb:1x8", 8, 32768,
         {**K, **ON_DEVICE, "tp": 8, "sequence_parallel": "false"}, explore=("recompute=partitioned",)),
    # Layers wider than a device's memory, and experts beside them: what is tried first also wins.
    *(
        Case(choice, by, "mixtral-8x7b", "h100-sxm:4x8", 256, 4096, {**K, "tp": 2})
        for choice, by in (
            ("tensor=1d", "megatron_tp_1d"), ("expert=folded", "moe_folding"), ("pipeline=stages", "megatron_interleaved"),
            ("optimizer=adamw", "optimizer_bytes"), ("attention_kernel=flash", "flash_attention"),
            ("loss_kernel=fused", "fused_cross_entropy"), ("precision=bf16", "flash_attention"),
        )
    ),
    # In a pipeline gradients add up over micro-batches; sharded ones would be sent after each.
    Case("zero_stage=1", "zero1", "mixtral-8x7b", "h100-sxm:4x8", 256, 4096, {**K, "tp": 2, "pp": 4}),
    # All-reduces on PCIe without sequence parallelism: Wang et al. 2024 (arXiv:2409.15241).
    Case("tensor_overlap=domino", "domino", "llama2-13b", "a6000:1x8", 16, 2048,
         {"tp": 8, "tensor": "1d", "sequence_parallel": "false", "loss_kernel": "fused", "gradient_accumulation": "fused"},
         explore=("all",)),
    # Long causal sequences over more ranks than divide the 25 heads: Li et al. 2024 (arXiv:2310.03294); where attention hides
    # more, balance counts, and queries are as wide as keys: Wang et al. 2024 (arXiv:2412.20501).
    *(
        Case(f"context={choice}", by, "gpt2-xl", cluster, 8, seq,
             {"cp": 8, "tp": 1, "pp": 1, "recompute": "none", "optimizer_offload": "none", "activation_offload": "none",
              "parameter_offload": "none", "loss_kernel": "fused", "gradient_accumulation": "fused",
              "sequence_parallel": "false"}, explore=("all",))
        for choice, by, cluster, seq in (
            ("helped", "dist_flash_attn", "a6000:1x8", 8192), ("tokens", "token_ring", "a100-sxm-80gb:8x1", 65536),
        )
    ),
    # The same where everything is recomputed, attention included or not: arXiv:2310.03294, section 3.3.
    Case("recompute=but_attention", "but_attention", "llama-7b", "a100-sxm-80gb:1x1", 1, 49152,
         {"tp": 1, "loss_kernel": "fused", "gradient_accumulation": "fused", "parameter_offload": "none",
          "activation_offload": "none", "optimizer_offload": "cpu", "zero_stage": 0}, host_gb=300, explore=("all",)),
    # Between the named modules and everything, where memory is short: Jain et al. 2020 (arXiv:1910.02653).
    *(
        Case(f"recompute={choice}", "recompute_front", model, cluster, 16, 16384,
             {"tp": 1, "cp": 1, "pp": 1, "optimizer_offload": "none", "activation_offload": "none", "parameter_offload": "none"},
             explore=("recompute=*",))
        for choice, model, cluster in (
            ("norm+qkv+fc1", "llama2-7b", "a100-sxm-40gb:1x8"), ("norm+fc1", "llama2-13b", "a100-sxm-80gb:1x8"),
            ("norm+act+qkv", "llama-7b", "a100-sxm-80gb:1x4"),
        )
    ),
    # Two pipelines that take turns, where late gradients are not wanted: Chen et al. 2023 (PPoPP).
    Case("schedule=avgpipe", "avgpipe", "gpt3-1.3b", "a100-sxm-40gb:1x8", 16, 2048,
         {**PLAIN, "pp": 8, "micro_batch_size": 1, "zero_stage": 1}, allowed=("staleness",), explore=("schedule=avgpipe",),
         forbidden=("co2", "diloco", "noloco", "neighbours")),
    # 65B on eight 24 GB cards behind PCIe: Feng et al. 2023 (ASPLOS) is about such servers.
    Case("schedule=mobius", "mobius", "llama-65b", "rtx-3090:1x8", 64, 512,
         {**K, "gradient_dtype": "fp16", "cp": 1, "parameter_offload": "none"},
         {"precisions": ("fp16",)}, host_gb=256, explore=("schedule=mobius", "optimizer_offload=*")),
    # Experts on 32 ranks of four nodes, whose all-to-alls meet all other gradients: Li et al. 2023 (arXiv:2210.17223).
    Case("expert_overlap=priority", "lina", "deepseek-v2-lite", "a100-sxm-80gb:4x8", 64, 4096,
         {**FLAT, **ON_DEVICE, "ep": 32, "micro_batch_size": 2},
         explore=("expert_overlap=priority",)),
    # Experts as unlike as 1/j on ranks that share them: Liu et al. 2023 (SIGCOMM) where they are small, He et al. 2022 (PPoPP)
    # where they are large and copies wait, Qing et al. 2025 (arXiv:2502.02581) where they come beside attention.
    *(
        Case(f"expert={choice}", by, model, "h100-sxm:1x8", batch, seq,
             {"ep": 8, "tp": 1, "cp": 1, "pp": 1, "loss_kernel": "fused", "gradient_accumulation": "fused", "tensor": "1d",
              "sequence_parallel": "false"}, {"expert_zipf": 1.0}, explore=("all",), forbidden=forbidden)
        for choice, by, model, batch, seq, forbidden in (
            ("fetched", "janus", "deepseek-moe-16b", 64, 4096, ()),
            ("shadow1", "fastermoe", "mixtral-8x7b", 8, 512, ("hecate_fssdp",)),
            ("sparse1", "hecate_fssdp", "mixtral-8x7b", 8, 512, ()),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.choice for case in CASES])
def test_the_search_chooses_it_where_it_wins(case: Case) -> None:
    problem = case.problem()
    best = search(problem, top=1).best
    slot, value = case.choice.split("=", 1)
    assert str(best.knobs[slot]).lower() == value
    assembly = examine(
        replace(problem, fixed=replay(best).fixed, allowed=best.permissions, explore=(), forbidden=())
    )
    assert assembly.plan.estimate.step_time_s == pytest.approx(best.estimate.step_time_s)
    assert case.by in techniques(second_tree(assembly)) | techniques(byte_tree(assembly))
    if case.instead is not None:
        with pytest.raises(Infeasible):
            search(replace(problem, workload=replace(problem.workload, **case.instead)), top=1)


def techniques(tree: Any) -> set[str]:
    """All techniques that an account names."""
    if isinstance(tree, dict):
        own = {tree["technique"]} if "technique" in tree else set()
        return own.union(*(techniques(value) for value in tree.values()), set())
    if isinstance(tree, list | tuple):
        return set().union(*map(techniques, tree))
    return set()
