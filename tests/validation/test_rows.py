"""From a row's cells to the run that the planner prices, and to what the row measured."""

import pytest

from planner.specs.models import load_model
from planner.specs.parameters import parameter_count
from planner.specs.workload import TrainWorkload
from planner.validation.measured import asks_for, out_of_memory, peak_memory_bytes, tokens_per_s_per_device
from planner.validation.plans import run_of
from planner.validation.table import Unsupported, read_table, table_kind
from planner.validation.training import predicted_run


def rate(row):
    problem = run_of(row).problem
    return tokens_per_s_per_device(
        row, problem.model, problem.workload, problem.cluster.devices, problem.cluster.device, "bf16"
    )


# -- kinds of table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("engine engine_version model accelerator input_len output_len", "serving"),
        ("source accelerator kernel_source dtype m n k latency_ms power_w", "kernels"),
        (
            "accelerator moe_dtype num_tokens hidden_size inter_size topk num_experts moe_ep_size latency_ms",
            "kernels",
        ),
        ("accelerator library collective dtype n_devices size_bytes latency_ms", "collectives"),
        ("accelerator op_name moe_dtype num_tokens hidden_size moe_ep_size latency_ms", "collectives"),
        ("accelerator node_num hidden_size dispatch_avg_t_us combine_avg_t_us", "collectives"),
        ("name price", "unknown"),
    ],
)
def test_the_header_tells_the_kind(columns, kind):
    assert table_kind(tuple(columns.split())) == kind


def test_a_row_without_name_is_its_place(table):
    path = table({"n_layers": "1"}, {"n_layers": "2"})
    assert [row.row_id for row in read_table(path).rows] == ["runs.csv:2", "runs.csv:3"]


# -- model -------------------------------------------------------------------------------------------------------------


def test_a_shipped_model_is_recognised(row):
    model = run_of(row()).problem.model
    assert parameter_count(model) == parameter_count(load_model("llama3.1-8b"))


def test_columns_alone_describe_a_model(row):
    cells = {
        "hidden": "2048",
        "ffn_hidden": "8192",
        "n_heads": "16",
        "n_kv_heads": "",
        "head_dim": "",
        "vocab": "50257",
    }
    cells |= {"mlp": "gelu", "tied_embeddings": "", "n_layers": "24", "seq_len": "2048", "model": "GPT-1.3B"}
    model = run_of(row(**cells)).problem.model
    # GPT-3 XL without biases is 12·24·2048² in its layers; with biases and norms 13·2048 more per layer (QKV 3, output 1,
    # fc1 4, fc2 1, two norms 4), and embeddings of 50257 + 2048 rows and the last norm.
    assert parameter_count(model) == 12 * 24 * 2048**2 + 24 * 13 * 2048 + (50257 + 2048) * 2048 + 2 * 2048
    assert model.tied_embeddings


def test_a_printed_parameter_count_tells_whether_there_are_biases(row):
    cells = {
        "hidden": "2560",
        "ffn_hidden": "10240",
        "n_heads": "20",
        "n_kv_heads": "20",
        "vocab": "50368",
        "mlp": "gelu",
    }
    cells |= {
        "n_layers": "32",
        "seq_len": "2048",
        "model": "MPT-3b",
        "tied_embeddings": "true",
        "head_dim": "128",
    }
    # llm-foundry's benchmark table prints 2651837440 for its MPT 3B at this length: 12·32·2560² and embeddings of 50368 + 2048
    # rows make 2650767360, norms with biases 65·2·2560, other biases 32·9·2560. Without biases 65·2560 are left of those.
    with_biases, without = 2_651_837_440, 2_650_767_360 + 65 * 2560
    for printed, count in (
        ("2.651837", with_biases),
        ("2.650934", without),
        ("", with_biases),
        ("2.7", with_biases),
    ):
        assert parameter_count(run_of(row(**cells, n_params_b=printed)).problem.model) == count


def test_fewer_layers_than_the_model_has(row):
    cells = {
        "model": "deepseekv2 trimmed to 4 layers",
        "n_layers": "4",
        "hidden": "5120",
        "n_heads": "128",
        "vocab": "102400",
    }
    cells |= {
        "n_kv_heads": "128",
        "n_experts": "160",
        "top_k": "6",
        "expert_ffn_hidden": "1536",
        "moe_layers": "3",
        "pp": "1",
    }
    cells |= {"ffn_hidden": "12288", "tp": "1", "ep": "8"}
    model = run_of(row(**cells)).problem.model
    assert [(name, count) for name, count in model.layers] == [("dense", 1), ("moe", 3)]
    assert model.blocks["moe"].attention.latent  # no column says so; the shipped DeepSeek-V2 does
    assert model.blocks["moe"].moe.shared_ffn == 3072


def test_experts_are_dealt_where_a_dispatcher_is_named(row):
    cells = {
        "n_experts": "128",
        "top_k": "8",
        "expert_ffn_hidden": "768",
        "hidden": "2048",
        "tp": "1",
        "pp": "1",
        "model": "m",
    }
    degrees = [
        run_of(row(**cells, other_flags=f)).problem.fixed["ep"]
        for f in ("", "TE + DeepEP", "HybridEP; graphs")
    ]
    assert degrees == [1, 16, 16]


EXPERTS = {"n_experts": "128", "top_k": "8", "expert_ffn_hidden": "768", "hidden": "2048", "model": "m"}


@pytest.mark.parametrize(
    ("ep", "etp"), [("4", 2), ("8", 1)]
)  # 16 devices, two stages: 8 ranks, of which attention has tp 2
def test_experts_are_cut_as_the_attention_where_there_are_ranks_for_it(row, ep, etp):
    assert run_of(row(**EXPERTS, ep=ep)).problem.fixed["etp"] == etp


NVL72 = {"accelerator": "GB200-NVL72", "devices_per_node": "4", "framework_version": "25.11"}
SILENT = NVL72 | {"recompute": "", "other_flags": ""}


@pytest.mark.parametrize(
    ("cells", "knobs"),
    [
        # Megatron-Bridge scripts/performance/configs @v0.2.0, which the container 25.11 has: hybridep on GB200 and GB300.
        (SILENT, {"dispatch": "fused"}),
        (SILENT | {"framework_version": "25.09"}, {"dispatch": None}),  # @v0.1.0rc3: H100 alone has a dispatcher
        (SILENT | {"recompute": "none"}, {"dispatch": None}),  # read beside a recipe that names none
        (SILENT | {"accelerator": "B200-SXM", "devices_per_node": "8"}, {"dispatch": None}),
        ({"other_flags": "moe_flex_dispatcher_backend=deepep; moe_a2a_overlap=True"},
         {"dispatch": "deepep", "expert_overlap": "combined_1f1b", "exchange_stream": "plain"}),
        # scripts/performance/utils/overrides.py @v0.5.0: high_priority_a2a_comm_stream beside fused experts
        ({"other_flags": "cuda_graph_impl=full_iteration; moe_flex_dispatcher_backend=hybridep; moe_a2a_overlap=True"},
         {"dispatch": "fused", "exchange_stream": "priority"}),
        ({"notes": "mock data, balanced fake gate"}, {"routing": "neighbours"}),
        ({}, {"routing": None, "exchange_stream": None}),
    ],
)  # fmt: skip
def test_how_tokens_come_to_experts(row, cells, knobs):
    fixed = run_of(row(**EXPERTS, **cells)).problem.fixed
    assert {name: fixed.get(name) for name in knobs} == knobs


@pytest.mark.parametrize(
    ("cells", "stack", "stage"),
    [
        # NeMo Automodel's pull request 574 of 8 October 2025 has pipelines of mixtures synchronise once.
        ({"other_flags": "TE + DeepEP", "measured_date": "2025-10-02"}, "automodel", "fsdp"),
        ({"other_flags": "TE + DeepEP", "measured_date": "2026"}, "automodel", "1"),
        ({"other_flags": "TE + DeepEP + FlexAttn"}, "automodel-torch", "1"),
        ({"other_flags": "TE + triton"}, "pytorch-fsdp", "1"),
    ],
)
def test_mixtures_of_automodel(row, cells, stack, stage):
    sharded = {
        "framework": "PyTorch FSDP2",
        "zero_stage": "3",
        "sharding_as_printed": "fsdp (FSDP2)",
        "tp": "1",
    }
    problem = run_of(row(**EXPERTS, **sharded, **({"measured_date": "2026"} | cells))).problem
    assert (problem.stack.name, problem.fixed["zero_stage"]) == (stack, stage)


def test_layers_that_divide_into_no_chunks_are_dealt_all_the_same(row):
    """61 layers in 16 chunks, as Megatron-Bridge lays DeepSeek-V3 out on two stages (Et*4|(t*4|)*14tmL)."""
    layers = predicted_run(run_of(row(n_layers="61", model="m", vpp="8")))[1].layout.chunks.sum(axis=2)
    assert layers.sum() == 61 + 2  # and embedding and head
    assert layers.min() >= 3


def test_the_last_stage_has_room_for_modules_that_predict_more_tokens(row):
    # Et*4|(t*4|)*14tmL: embedding and four layers, fourteen times four, one with the module and the loss.
    cells = {"n_layers": "61", "model": "m", "vpp": "8", "other_flags": "mtp-num-layers=1"}
    chunks = predicted_run(run_of(row(**cells)))[1].layout.counts[:, 0]
    assert chunks.tolist() == [4.0] * 15 + [1.0]


def test_selective_recompute_of_whole_layers_takes_as_few_as_fit(row):
    # fms-fsdp's README: 13B and 70B, 2 sequences of 4096, "Selective AC" on 128 A100; its MFU 0.61 and HFU 0.69 of 13B mean that
    # 0.08/0.61 of 3 forwards, 39 % of one, ran again; 0.55 and 0.74 of 70B mean all of it.
    fsdp = {
        "framework": "PyTorch FSDP1", "accelerator": "A100-SXM-80GB", "n_devices": "128", "tp": "1", "pp": "1", "zero_stage": "3",
        "sharding_as_printed": "fsdp", "micro_batch": "2", "global_batch": "256", "seq_len": "4096", "recompute": "selective",
        "vocab": "32000",
    }  # fmt: skip
    small = {
        "n_layers": "40",
        "hidden": "5120",
        "ffn_hidden": "13824",
        "n_heads": "40",
        "n_kv_heads": "40",
        "model": "m",
    }
    large = {
        "n_layers": "80",
        "hidden": "8192",
        "ffn_hidden": "28672",
        "n_heads": "64",
        "n_kv_heads": "8",
        "model": "m",
    }
    shares = [
        predicted_run(run_of(row(**fsdp | model)))[0].problem.fixed["recompute_layers"]
        / int(model["n_layers"])
        for model in (small, large)
    ]
    assert shares == [0.25, 0.75]


def test_state_space_layers_come_with_the_shipped_model(row):
    cells = {
        "model": "Nemotron-3-Nano",
        "n_layers": "52",
        "hidden": "2688",
        "n_heads": "32",
        "n_kv_heads": "2",
        "vocab": "",
    }
    cells |= {
        "n_experts": "128",
        "top_k": "6",
        "expert_ffn_hidden": "1856",
        "ffn_hidden": "1856",
        "tp": "1",
        "pp": "1",
    }
    cells |= {"ep": "8", "mlp": ""}
    model = run_of(row(**cells)).problem.model
    assert any(block.ssm for block in model.blocks.values())


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "knobs"),
    [
        ({"zero_stage": "3", "sharding_as_printed": "fsdp (FSDP2)", "framework": "PyTorch FSDP2", "pp": "1"},
         {"zero_stage": "fsdp"}),
        ({"zero_stage": "3", "sharding_as_printed": "fsdp (FSDP2)", "framework": "PyTorch FSDP2"}, {"zero_stage": "1"}),
        ({"zero_stage": "3", "sharding_as_printed": "fsdp (Megatron FSDP)"}, {"zero_stage": "3"}),
        ({"zero_stage": ""}, {"zero_stage": "1"}),
        ({"shard_group": "node"}, {"zero_group": "full"}),  # dp is 4, and a node of 8 holds them all at tp 2
        ({"shard_group": "node", "pp": "1"}, {"zero_group": "node"}),
        ({"shard_group": "4", "pp": "1"}, {"zero_group": "node"}),
        ({"shard_group": "1"}, {"zero_stage": "0", "zero_group": "full"}),
        ({"recompute": "selective:layernorm+moe_act"}, {"recompute": "norm+act"}),
        ({"recompute": "block:3", "vpp": "2"}, {"recompute": "block", "recompute_layers": 6, "schedule": "interleaved"}),
        ({"pp": "1", "shard_group": "2"}, {"zero_group": "ranks", "zero_group_ranks": 2}),
        ({"recompute": "selective:per_op_sac"}, {"recompute": "per_op"}),
        ({"recompute": "selective:moe+layernorm"}, {"recompute": "modules", "recompute_modules": "layernorm+moe"}),
        ({"recompute": "selective:every_other_layer"}, {"recompute": "block", "recompute_layers": 8}),
        ({"vpp": "", "schedule": "interleaved_1f1b"}, {"virtual_stages": 2, "schedule": "interleaved"}),
        ({"sequence_parallel": "false"}, {"sequence_parallel": "false"}),
        ({"sequence_parallel": ""}, {"sequence_parallel": "true"}),
        ({"sequence_parallel": "", "framework": "Megatron-LM"}, {"sequence_parallel": "false"}),
        ({"dtype": "fp8_rowwise"}, {"precision": "fp8_rowwise"}),
        ({"dtype": "", "accelerator": "V100-SXM2-32GB"}, {"precision": "fp16", "gradient_dtype": "fp32"}),
        ({"dtype": "fp16", "framework": "Megatron-LM"}, {"gradient_dtype": "fp16"}),
        ({"dtype": "bf16", "framework": "Megatron-LM"}, {"gradient_dtype": "fp32"}),
        ({"dtype": "bf16", "framework": "Megatron-DeepSpeed"}, {"gradient_dtype": "fp32"}),
        ({"dtype": "bf16", "framework": "Megatron-DeepSpeed", "zero_stage": "2"}, {"gradient_dtype": "bf16"}),
        ({"dtype": "fp16", "framework": "Megatron-DeepSpeed"}, {"gradient_dtype": "fp16"}),
        ({"recompute": "selective:mlp"}, {"recompute": "modules", "recompute_modules": "mlp"}),
        ({"recompute": "selective", "framework": "PyTorch FSDP1", "pp": "1"}, {"recompute": "block", "recompute_layers": 8}),
        ({"recompute": "selective", "framework": "Megatron-LM"}, {"recompute": "selective"}),
        ({"vpp": "", "framework_version": "24.07", "other_flags": "SFT"}, {"virtual_stages": 16, "optimizer": "adamw_16bit"}),
        ({"vpp": "", "framework_version": "24.07", "other_flags": "LoRA"}, {"virtual_stages": 1}),
        ({"vpp": ""}, {"virtual_stages": 1}),
        ({"other_flags": "", "framework": "PyTorch FSDP2"}, {"elementwise_kernel": "eager"}),
        ({"other_flags": "torch.compile", "framework": "PyTorch FSDP2", "pp": "1", "tp": "1", "measured_date": "2025-06"},
         {"loss_kernel": "fused"}),
        ({"other_flags": "torch.compile", "framework": "PyTorch FSDP2", "pp": "1", "tp": "1", "measured_date": "2025",
          "source": "x/y benchmarks/run_h100_202412_x.md @aabbcc"}, {"loss_kernel": None}),  # the stack says
        ({"other_flags": "torch.compile=True", "framework": "PyTorch FSDP2", "pp": "1", "tp": "1", "measured_date": "2025",
          "source": "x/y benchmarks/run_2025-06_x.md @aabbcc"}, {"loss_kernel": "fused"}),
        ({"other_flags": "torch.compile=False", "framework": "PyTorch FSDP2", "pp": "1", "tp": "1", "measured_date": "2025-06"},
         {"loss_kernel": None}),
        ({"other_flags": "no-gradient-accumulation-fusion=True"}, {"gradient_accumulation": "separate"}),
        ({"other_flags": "FSDP mixed_precision=PURE"}, {"gradient_dtype": "bf16"}),
        ({"offload": "optimizer+params"}, {"optimizer_offload": "cpu", "parameter_offload": "cpu"}),
        ({"offload": "activations:20"}, {"activation_offload": "cpu", "activation_offload_layers": 20}),
        ({"other_flags": "lora"}, {"adaptation": "lora", "adapter_targets": "linear_qkv"}),
        ({"other_flags": "LoRA; lora_rank=8", "framework": "PyTorch FSDP2"}, {"adaptation": "lora", "adapter_rank": "8"}),
        ({"other_flags": "attention-backend=unfused; cp comm a2a", "cp": "2"}, {"attention_kernel": "eager", "context": "a2a"}),
        ({"other_flags": "Float8 + Async TP"}, {"tensor_overlap": "chunked"}),
        ({"other_flags": "optimizer=muon"}, {"optimizer": "muon"}),
        ({"other_flags": "torch.compile=False", "framework": "PyTorch FSDP2"}, {"elementwise_kernel": "eager"}),
        ({"other_flags": "CUDA_LAUNCH_BLOCKING=1 in later runs"}, {"cuda_graph": "blocking"}),
        ({"other_flags": "cuda_graph_impl=full_iteration; moe_a2a_overlap=True"},
         {"cuda_graph": "full", "expert_overlap": "combined_1f1b"}),
        ({"other_flags": "EP overlap on"}, {"expert_overlap": "combined_1f1b"}),
        ({}, {"loss_kernel": "eager"}),
        ({"other_flags": "fused cross entropy (cef)"}, {"loss_kernel": "fused"}),
    ],
)  # fmt: skip
def test_knobs(row, cells, knobs):
    fixed = run_of(row(**cells)).problem.fixed
    assert {name: fixed.get(name) for name in knobs} == knobs


def test_a_stack_that_names_its_kernels_is_not_overruled(row):
    problem = run_of(row(framework_version="26.02")).problem
    assert problem.stack.name == "megatron-bridge"
    assert not {"loss_kernel", "gradient_dtype"} & set(problem.fixed)


def test_packed_samples_attend_to_themselves_alone(row):
    # InternLM's internlm/data/packed_dataset.py, PackedDatasetWithoutCuSeqlen: cu_seqlens are multiples of the sample length.
    packed, apart = (
        run_of(row(other_flags=f"pack_sample_into_one={said}", micro_batch="4")).problem
        for said in ("True", "False")
    )
    assert (packed.workload, packed.fixed) == (apart.workload, apart.fixed)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1600 Gbps RoCE", 1600e9 / 8 / 8),
        ("4x200Gb/s HDR InfiniBand per node", 4 * 200e9 / 8 / 8),
        ("8x HDR 200Gb/s InfiniBand per node", 200e9 / 8),
        ("RDMA 400 Gb/s per GPU", 400e9 / 8),
        ("4x Omni-Path (OPA) per node", 4 * 100e9 / 8 / 8),
        ("8x400G IB", 400e9 / 8),
        ("RoCE v2 200Gbps x 8", 200e9 / 8),
        ("100GbE", 100e9 / 8 / 8),
        ("12.5 GB/s RoCE", 12.5e9 / 8),
        ("3.2 Tbps EFA", 3.2e12 / 8 / 8),
        ("1,600 Gbit/s", 1600e9 / 8 / 8),
        ("400Gb/s/GPU", 400e9 / 8),
        ("0 Gb/s", 50e9),
        ("", 50e9),  # the profile's own
    ],
)
def test_printed_networks(row, text, bytes_per_s):
    tiers = run_of(row(inter_node_link=text)).problem.cluster.tiers
    assert [(tier.name, tier.size) for tier in tiers] == [("nvlink", 8), ("nic", 16)]
    assert tiers[1].bytes_per_s == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("PCIe 50 Gbps", 50e9 / 8), ("PCIe 25 GB/s", 25e9), ("PCIe Gen5 x16", 32e9 / 8 * 16 * 128 / 130)],
)
def test_printed_links_inside_a_node(row, text, bytes_per_s):
    # PCI Express Base Specification 5.0: 32 GT/s on each of 16 lanes, 128 of 130 bits data
    assert run_of(row(intra_node_link=text)).problem.cluster.tiers[0].bytes_per_s == pytest.approx(
        bytes_per_s, rel=1e-3
    )


@pytest.mark.parametrize(
    ("schedule", "choice"),
    [("", "1f1b"), ("1F1B", "1f1b"), ("GPipe", "gpipe"), ("zb-h1", "zb_h1"), ("zero bubble", "zb_h1")],
)
def test_a_row_runs_the_schedule_that_it_names(row, schedule, choice):
    assert run_of(row(schedule=schedule)).problem.fixed["schedule"] == choice


def test_sharding_by_the_name_of_a_wrapper(row):
    cells = {"framework": "PyTorch FSDP2", "tp": "1", "pp": "1"}
    found = [
        run_of(row(**cells, zero_stage=text)).problem.fixed
        for text in ("fsdp (FULL_SHARD)", "hsdp", "fsdp (SHARD_GRAD_OP)")
    ]
    assert [(fixed["zero_stage"], fixed["zero_group"]) for fixed in found] == [
        ("fsdp", "full"), ("3", "node"), ("2", "full"),
    ]  # fmt: skip


def test_formats_by_other_names(row):
    found = [run_of(row(dtype=dtype)).problem.fixed["precision"] for dtype in ("bfloat16", "float16", "FP16")]
    assert found == ["bf16", "fp16", "fp16"]


def test_a_parameter_count_that_is_no_number_tells_nothing(row):
    assert run_of(row(model="x", n_params_b="8.0B")).problem.model == run_of(row(model="x")).problem.model


def test_silent_cells_of_what_was_measured_are_told(row):
    silent = {"framework", "peak_memory_unit", "peak_memory_kind"}
    assert silent <= set(run_of(row(framework="", peak_memory_gb="60")).defaults)
    cells = {"peak_memory_gb": "60", "peak_memory_unit": "GiB", "peak_memory_kind": "smi"}
    assert not silent & set(run_of(row(**cells)).defaults)


def test_ports_of_omni_path_reach_what_was_measured_of_them(row):
    # BigScience, experiments/bandwidth/all_reduce_bench-a100-n4.txt: 40.5 Gb/s of bus bandwidth through one port of 100 Gb/s.
    changed = {"accelerator": "A100-SXM-80GB", "inter_node_link": "4x Omni-Path (OPA) per node"}
    fabric = run_of(row(**changed)).problem.cluster.tiers[-1]
    assert fabric.effective_bytes_per_s == pytest.approx(4 * 40.5e9 / 8 / 8)  # four ports for eight devices


def test_the_stack_follows_framework_and_date(row):
    cells = ({"framework": "Megatron-LM", "measured_date": "2021"}, {"measured_date": "2024"}, {})
    stacks = [run_of(row(**changed)).problem.stack.name for changed in cells]
    assert stacks == ["megatron-eager", "default", "megatron-core"]


@pytest.mark.parametrize(
    ("product", "wrapper"),
    [
        ("torchtitan", "PyTorch FSDP2"),
        ("NeMo Automodel 25.11", "PyTorch FSDP2"),
        ("llm-foundry", "Composer FSDP1"),
    ],
)
def test_a_product_of_a_wrapper_is_priced_as_the_wrapper(row, product, wrapper):
    found = [run_of(row(framework=name, sequence_parallel="")) for name in (product, wrapper)]
    assert found[0].problem.stack == found[1].problem.stack
    assert found[0].problem.fixed == found[1].problem.fixed


def test_containers_of_nemo_are_those_of_megatron_core(row):
    found = [
        run_of(row(framework=name, framework_version="25.09"))
        for name in ("NeMo", "Megatron-Bridge", "Megatron-Core")
    ]
    assert [run.problem.stack.name for run in found] == ["megatron-bridge"] * 3


def test_gpts_under_megatron_drop_out_as_its_arguments_default_to(row):
    # --attention-dropout and --hidden-dropout are 0.1 (megatron/training/arguments.py); recipes of Llama set them to 0.
    gpt = {
        "mlp": "gelu",
        "hidden": "2048",
        "ffn_hidden": "8192",
        "n_heads": "16",
        "n_kv_heads": "",
        "head_dim": "",
        "model": "G",
    }
    found = [
        run_of(row(**cells)).problem.model.dropout
        for cells in (gpt, gpt | {"framework": "PyTorch FSDP2"}, {})
    ]
    assert found == [True, False, False]


def test_defaults_that_were_taken_are_told(row):
    assert "zero_stage" in run_of(row(zero_stage="")).defaults
    assert "zero_stage" not in run_of(row()).defaults


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"hidden": ""}, "mandatory cells are empty: hidden"),
        ({"n_experts": "8"}, "top_k, expert_ffn_hidden"),
        ({"n_devices": "nan"}, "n_devices is 'nan'"),
        ({"n_devices": "9" * 5000}, "n_devices is"),
        ({"n_layers": "1.5"}, "no whole number"),
        ({"n_layers": "100000"}, "more than 10,000"),
        ({"tp": "0"}, "must not be 0: tp"),
        ({"cp": "0", "vpp": "0"}, "must not be 0: cp, vpp"),
        ({"tp": "3"}, "do not divide"),
        ({"global_batch": "63"}, "no whole number of micro-batches"),
        ({"n_devices": "12"}, "no whole nodes"),
        ({"accelerator": "abacus"}, "no profile of accelerator 'abacus'"),
        ({"accelerator": ""}, "no accelerator"),
        ({"n_kv_heads": "5", "model": "x"}, "does not divide heads"),
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"schedule": "round robin"}, "schedule 'round robin': not modelled"),
        ({"seq_len": "1e30"}, "seq_len is '1e30', more than"),
        ({"recompute": "selective:nothing"}, "recompute"),
        ({"offload": "activations:all"}, "offload"),
        ({"other_flags": "QLoRA"}, "adapters"),
        ({"mlp": "maxout"}, "maxout"),
        ({"zero_stage": "4"}, "zero_stage"),
        ({"pp": "1", "shard_group": "3"}, "shard_group '3' does not divide 8"),
        ({"sequence_parallel": "yes"}, "sequence_parallel"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_priced_say_why(row, cells, reason):
    with pytest.raises(Unsupported, match=reason):
        run_of(row(**cells))


def test_low_rank_latents_are_no_low_rank_adaptation(row):
    assert "adaptation" not in run_of(row(other_flags="q-lora-rank=256; kv-lora-rank=128")).problem.fixed


@pytest.mark.parametrize(("tflops", "modules"), [("961", 0), ("1002", 1)])
def test_printed_flop_tell_whether_a_module_predicts_more_tokens(row, tflops, modules):
    # Megatron-Bridge, container 25.11: DeepSeekV3 on GB300, "w/o MTP" 3848 tokens/s at 961 TFLOP/s; "w/ MTP" 557/2139 of those.
    cells = {
        "model": "DeepSeekV3", "n_layers": "61", "hidden": "7168", "n_heads": "128", "n_kv_heads": "128", "head_dim": "",
        "ffn_hidden": "18432", "vocab": "129280", "n_experts": "256", "top_k": "8", "n_shared_experts": "1", "tp": "1",
        "vpp": "1",
        "expert_ffn_hidden": "2048", "moe_layers": "58", "seq_len": "4096", "ep": "8", "tokens_per_s_per_device": "3848",
        "tflops_per_device": tflops, "tflops_convention": "model_flops",
    }  # fmt: skip
    assert run_of(row(**cells)).problem.model.mtp_modules == modules


def test_modules_that_predict_more_tokens_are_trained_where_a_row_says_so(row):
    assert run_of(row(other_flags="mtp-num-layers=2")).problem.model.mtp_modules == 2
    assert run_of(row()).problem.model.mtp_modules == 0


# -- what was measured -------------------------------------------------------------------------------------------------


def test_rates_become_tokens_per_second_and_device(row):
    tokens = 64 * 8192 / 16
    assert rate(row()) == pytest.approx(tokens / 4.0)
    assert rate(row(tokens_per_s_per_device="8000")) == 8000.0  # as printed, before the step time
    assert rate(row(step_time_s="", step_time_s_derived="2")) == pytest.approx(tokens / 2.0)


def test_model_and_hardware_flop_are_kept_apart(row):
    # Llama-3.1 8B at 8192: 2·(params without embedding) + 4·L·s·h per token forward, three times that with the backward;
    # hardware FLOP with full recompute run the layers' forward once more.
    head, layers = 128256 * 4096, 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    forward = 2 * layers + 4 * 32 * 8192 * 4096
    model, hardware = 3 * forward + 6 * head, 4 * forward + 6 * head
    cells = {"step_time_s": "", "tflops_per_device": "400"}
    assert rate(row(**cells, tflops_convention="model_flops")) == pytest.approx(400e12 / model)
    assert rate(row(**cells, tflops_convention="hardware_flops (Megatron)")) == pytest.approx(
        400e12 / hardware
    )
    by_parameters = rate(row(**cells, tflops_convention="hardware_flops (4 x 2 x params x tokens)"))
    assert by_parameters == pytest.approx(400e12 / (8 * 8_030_261_248))
    assert rate(row(**cells)) == rate(row(**cells, tflops_convention="model_flops"))
    assert "tflops_convention" in run_of(row(**cells)).defaults
    assert (
        "tflops_convention" not in run_of(row(tflops_per_device="400")).defaults
    )  # its step time is printed
    with pytest.raises(Unsupported, match="convention"):
        rate(row(**cells, tflops_convention="achieved"))


def test_utilisation_is_of_the_dense_peak(row):
    problem = run_of(row()).problem
    found = rate(row(step_time_s="", mfu="0.4"))
    per_token = 400e12 / rate(row(step_time_s="", tflops_per_device="400", tflops_convention="model_flops"))
    assert problem.workload == TrainWorkload(64, 8192)
    assert found == pytest.approx(0.4 * 989.4e12 / per_token)


@pytest.mark.parametrize(
    ("cells", "n_bytes"),
    [
        ({"peak_memory_gb": "60", "peak_memory_unit": "GiB"}, 60 * 2**30),
        ({"peak_memory_gb": "60", "peak_memory_unit": "GB"}, 60e9),
        ({"peak_memory_gb": "60"}, 60e9),
    ],
)
def test_units_of_memory(row, cells, n_bytes):
    assert peak_memory_bytes(row(**cells)) == n_bytes


@pytest.mark.parametrize(
    "cells",
    [{"peak_memory_gb": ""}, {"peak_memory_gb": "-1"}, {"peak_memory_gb": "6", "peak_memory_unit": "kg"}],
)
def test_memory_that_is_not_given(row, cells):
    with pytest.raises(Unsupported):
        peak_memory_bytes(row(**cells))


def test_what_a_row_asks_for(row):
    assert asks_for(row(score_for="memory+oom")) == ("peak_memory", "oom")
    assert asks_for(row(score_for="none")) == ()
    with pytest.raises(Unsupported, match="speed"):
        asks_for(row(score_for="time+speed"))
    cells = dict(row().cells)
    cells.pop("score_for")
    assert asks_for(type(row())("a.csv", 2, cells)) == ("tokens_per_s_per_device", "ranking")


def test_outcome_of_memory(row):
    assert out_of_memory(row(oom="true")) is True
    with pytest.raises(Unsupported):
        out_of_memory(row(oom=""))
