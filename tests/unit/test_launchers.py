"""Exports beyond Megatron-LM: every choice becomes the launcher's own words, and comes back; bad files get one clear message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from planner.errors import ExportError, SpecError
from planner.export import EXPORTERS, export, export_folder, find_exporter
from planner.export.caught import CAUGHT
from planner.export.checking import findings, path_to
from planner.export.closest import closest_plan
from planner.export.hf_model import hf_model
from planner.export.launched import LaunchedRun
from planner.export.launchers import LAUNCHERS
from planner.export.readers import READERS, read_launched
from planner.export.torchtitan import stages_of
from planner.specs.parameters import parameter_count
from planner.validation.plans import run_of
from planner.validation.table import read_table


def problem_of(model="llama3-8b", cluster="h100-sxm:8x8", batch=768, seq_len=None, **fixed):
    loaded = planner.load_model(model)
    workload = planner.TrainWorkload(
        batch, seq_len or min(loaded.max_seq_len, 8192), optimizer=fixed.get("optimizer", "adamw"),
        precisions=(fixed.get("precision", "bf16"),),
    )  # fmt: skip
    return planner.Problem(loaded, planner.load_cluster(cluster), workload, planner.load_stack(), fixed=fixed)


def plan_of(*names, **choices):
    return planner.estimate(problem_of(*names, **choices))


SHARDED = {"zero_stage": "fsdp", "sequence_parallel": "false"}
PLAIN = {"elementwise_kernel": "eager", "loss_kernel": "log_softmax"}


# -- words of the launchers ------------------------------------------------------------------------------------------


def test_deepspeed_writes_what_its_config_takes():
    plan = plan_of(
        zero_stage=3,
        optimizer_offload="cpu+gradients",
        parameter_offload="cpu",
        micro_batch_size=2,
        gradient_dtype="bf16",
    )
    found = json.loads(export(plan, "deepspeed")["deepspeed.json"])
    # 768 sequences = micro-batches of 2 · 6 accumulation steps · 64 ranks.
    assert [
        found[key]
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ] == [768, 2, 6]
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (
        3,
        "cpu",
        "cpu",
    )
    assert found["bf16"] == {"enabled": True}
    assert found["data_types"] == {"grad_accum_dtype": "bf16"}


def test_accelerate_names_the_mesh_and_what_is_sharded():
    text = export(plan_of(tp=2, zero_group="node", recompute="full", **SHARDED), "accelerate")[
        "accelerate.yaml"
    ]
    # 32 replicas, four in a node of eight with tp 2: eight copies of the states.
    for line in (
        "distributed_type: FSDP", "fsdp_version: 2", "fsdp_reshard_after_forward: true",
        "fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer", "fsdp_activation_checkpointing: true",
        "parallelism_config_dp_replicate_size: 8", "parallelism_config_dp_shard_size: 4",
        "parallelism_config_tp_size: 2", "num_processes: 64", "num_machines: 8", "mixed_precision: bf16",
    ):  # fmt: skip
        assert line in text


def test_trainer_arguments():
    found = json.loads(
        export(plan_of(cp=2, context="gathered_ring", **SHARDED, **PLAIN), "transformers")[
            "training_arguments.json"
        ]
    )
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (1, 24)
    assert found["fsdp"] is True
    assert found["fsdp_config"]["reshard_after_forward"] is True
    assert found["parallelism_config"] == {
        "dp_replicate_size": 1,
        "dp_shard_size": 32,
        "tp_size": 1,
        "cp_size": 2,
    }
    assert (found["torch_compile"], found["use_liger_kernel"]) == (False, False)


def test_torchtitan_flags_of_a_pipeline():
    plan = plan_of("llama3.1-70b", tp=4, pp=4, virtual_stages=5, zero_stage=1, recompute="full")
    lines = export(plan, "torchtitan")["flags.txt"].splitlines()
    # 4 replicas: each runs 192 micro-batches of one sequence per step; 80 layers on 20 stages.
    for line in (
        "--config llama3_70b", "--training.local-batch-size 192", "--training.global-batch-size 768",
        "--parallelism.pipeline-parallel-schedule Interleaved1F1B", "--parallelism.pipeline-parallel-layers-per-stage 4",
        "--parallelism.fsdp-reshard-after-forward never", "--parallelism.enable-sequence-parallel",
    ):  # fmt: skip
        assert line in lines
    assert lines[-1] == "activation-checkpoint:full"


def test_galvatron_says_it_for_every_layer():
    found = json.loads(
        export(plan_of("llama2-7b", batch=256, tp=2, pp=4, recompute="full", zero_stage=3), "galvatron")[
            "galvatron.json"
        ]
    )
    assert found["tp_sizes_enc"] == ",".join(["2"] * 32)
    assert found["checkpoint"] == ",".join(["1"] * 32)
    assert found["dp_types_enc"] == ",".join(["1"] * 32)
    # 256 sequences, 8 replicas, micro-batches of one.
    assert (found["pp_deg"], found["pp_division"], found["chunks"]) == (4, "8,8,8,8", 32)
    assert found["pipeline_type"] == "pipedream_flush"


def test_bridge_recipe_is_python_over_the_same_fields():
    text = export(plan_of("llama3.1-70b", tp=8, pp=4, virtual_stages=5, precision="fp8"), "megatron-bridge")[
        "recipe.py"
    ]
    compile(text, "recipe.py", "exec")
    for line in (
        "cfg.model.tensor_model_parallel_size = 8", "cfg.model.virtual_pipeline_model_parallel_size = 5",
        "cfg.model.sequence_parallel = True", "cfg.ddp.use_distributed_optimizer = True",
        "get_mixed_precision_config('bf16_with_fp8_current_scaling_mixed')", "cfg.train.global_batch_size = 768",
    ):  # fmt: skip
        assert line in text


def test_bridge_builds_the_model_of_the_plan():
    """AutoBridge looks classes up by ``architectures`` (megatron-bridge 0.6.2, auto_bridge.py: it refuses a config without).

    Transformers' DeepseekV3Config has one MTP module unless told, and DeepSeekV3Bridge turns shared experts' overlap on; the plan
    has neither.
    """
    files = export(plan_of("deepseek-v3", "h100-sxm:32x8", ep=32, pp=8, precision="fp8"), "megatron-bridge")
    config = json.loads(files["config.json"])
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["num_nextn_predict_layers"] == 0
    assert "cfg.model.moe_shared_expert_overlap = False" in files["recipe.py"]
    classes = {
        name: hf_model(planner.load_model(name)).config["architectures"]
        for name in ("qwen2.5-7b", "mixtral-8x7b")
    }
    assert classes == {"qwen2.5-7b": ["Qwen2ForCausalLM"], "mixtral-8x7b": ["MixtralForCausalLM"]}


def test_any_modules_are_recomputed_by_megatron():
    plan = plan_of("mixtral-8x7b", tp=8, recompute="modules", recompute_modules="moe_act+core_attn")
    assert "--recompute-modules core_attn moe_act" in export(plan, "megatron")["args.txt"]


@pytest.mark.parametrize(
    "name",
    [
        "llama3.1-8b",
        "qwen2.5-7b",
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "deepseek-v3",
        "gpt2-xl",
        "mistral-7b-v0.1",
    ],
)
def test_a_model_comes_back_from_its_transformers_config(name, tmp_path):
    model = planner.load_model(name)
    shape = hf_model(model)
    (tmp_path / "config.json").write_text(json.dumps(shape.config))
    assert parameter_count(planner.load_model(tmp_path)) == parameter_count(model)


def test_stages_are_dealt_as_torchtitan_deals_them():
    # torchtitan 0.3.0, _generate_llm_fqn_per_model_part(4, 30, 1, 1): 32 effective layers, eight per stage.
    assert stages_of(30, 4, 1, 1) == [7, 8, 8, 7]


# -- refusals name what cannot be said, and what can ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "choices", "why"),
    [
        ("deepspeed", {"pp": 2}, "pipelines are written in Python"),
        ("deepspeed", {"zero_stage": 0}, "accumulated in the format of the weights"),
        (
            "deepspeed",
            {"zero_stage": 2, "optimizer_offload": "cpu"},
            "gradients go to the host with the optimizer",
        ),
        ("accelerate", {"tp": 2, "zero_stage": 0, "sequence_parallel": "false"}, "needs sharded states"),
        ("accelerate", {"zero_stage": 3}, "cannot express zero_stage=3"),
        ("torchtitan", {"precision": "fp8"}, "cannot express precision=fp8"),
        ("torchtitan", {"gradient_dtype": "bf16", "zero_stage": "fsdp"}, "reduced in fp32"),
        ("galvatron", {"virtual_stages": 2, "pp": 2}, "cannot express schedule=interleaved"),
        (
            "transformers",
            {"tp": 16, "sequence_parallel": "false", "zero_stage": "fsdp"},
            "KV heads not divisible by tp",
        ),
    ],
)
def test_what_a_launcher_cannot_say_is_named(to, choices, why):
    with pytest.raises(ExportError, match=why):
        export(plan_of(**choices), to)


VEE = {"pp": 2, "virtual_stages": 2, "schedule": "dualpipev", "zero_stage": 1, "seq_len": 4096, **PLAIN}
# torch 2.13.0: _check_torch_compile_compatibility; a compiled region's backward refuses retain_graph (donated buffers), and
# torchtitan 0.3.0's attention is one unless it is varlen; a checkpointed layer is run again in stage_backward_weight.


@pytest.mark.parametrize(
    ("model", "choices", "why"),
    [
        ("llama3.1-8b", {}, "FlexAttention is always compiled"),
        ("gpt-oss-20b", {"elementwise_kernel": "fused"}, "DualPipeV needs eager kernels"),
        ("gpt-oss-20b", {"recompute": "full"}, "recomputed again for weight gradients"),
    ],
)
def test_a_backward_that_pytorch_does_not_cut_in_two_is_refused(model, choices, why):
    with pytest.raises(ExportError, match=why):
        export(plan_of(model, **VEE | choices), "torchtitan")


def test_dualpipev_is_written_for_a_recipe_whose_backward_can_be_cut(tmp_path):
    plan = plan_of("gpt-oss-20b", **VEE)
    (tmp_path / "run.sh").write_text(export(plan, "torchtitan")["run.sh"])
    assert "--parallelism.pipeline-parallel-schedule DualPipeV" in (tmp_path / "run.sh").read_text()
    found = read_launched("torchtitan", tmp_path / "run.sh").fixed
    assert (found["schedule"], found["virtual_stages"]) == ("dualpipev", 2)


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "InterleavedZeroBubble"])
def test_schedules_that_are_unlike_ours_are_refused_with_the_difference(schedule, tmp_path):
    (tmp_path / "flags.txt").write_text(
        "--module llama3 --config llama3_8b --parallelism.pipeline_parallel_degree 4 "
        f"--parallelism.pipeline_parallel_schedule {schedule}"
    )
    with pytest.raises(SpecError, match=f"{schedule}: .*weight gradients"):
        read_launched("torchtitan", tmp_path / "flags.txt")


def test_a_model_without_a_recipe_is_refused():
    with pytest.raises(ExportError, match="no recipe for this model"):
        export(plan_of("llama2-7b", seq_len=4096, **SHARDED), "torchtitan")


def test_the_closest_plan_keeps_what_the_launcher_can_say():
    plan = plan_of(tp=2, zero_stage=1, recompute="full")
    found = closest_plan(plan, "accelerate")
    assert found.plan.mesh == plan.mesh
    assert found.plan.knobs["recompute"] == "full"
    assert found.changes["zero_stage"][0] in ("1", 1)
    export(found.plan, "accelerate")


def test_the_closest_plan_gives_up_one_choice_where_that_is_enough():
    """Transformer Engine has buffers for qkv, proj, fc1 and fc2 (TELinear in megatron-core 0.19.2): none for latent attention."""
    plan = plan_of(
        "deepseek-v2-lite",
        tp=2,
        ep=8,
        tensor_overlap="chunked",
        recompute="modules",
        recompute_modules="mla_up_proj",
    )
    with pytest.raises(ExportError, match="no buffers for latent attention"):
        export(plan, "megatron")
    found = closest_plan(plan, "megatron")
    assert dict(found.changes) == {"tensor_overlap": ("chunked", "none")}


def test_versions_are_checked():
    with pytest.raises(SpecError, match=r"0\.19 or 0\.20"):
        find_exporter("megatron", "0.12")
    assert find_exporter("megatron", "0.20.1").versions == ("0.20.1",)


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_plan():
    return plan_of(tp=2, zero_stage=2, sequence_parallel="false", recompute="full")


@pytest.mark.parametrize("to", sorted(EXPORTERS))
def test_a_folder_holds_all_that_a_run_needs(to, plain_plan):
    files = export_folder(
        plain_plan if to != "galvatron" else plan_of("llama2-7b", seq_len=4096, zero_stage=2),
        to,
        around=["slurm", "kubernetes"],
    )
    assert {"run.sh", "plan.json", "measure.py", "README.md", "job.sbatch", "jobset.yaml"} <= set(files)
    assert (
        subprocess.run(
            ["bash", "-n"], input=files["run.sh"], text=True, capture_output=True, timeout=20
        ).stderr
        == ""
    )
    for name, text in files.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
        if name.endswith(".json"):
            json.loads(text)
    assert "## Check first" in files["README.md"]


def test_kubernetes_starts_a_pod_per_node(plain_plan):
    yaml = pytest.importorskip("yaml")
    (jobset,) = yaml.safe_load_all(
        export_folder(plain_plan, "deepspeed", around=["kubernetes"], image="my/image")["jobset.yaml"]
    )
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]["containers"][0]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (8, 8, "Indexed")
    assert pod["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["image"] == "my/image"
    # The Trainer makes its output folder before the first step, and a ConfigMap is mounted for reading.
    assert "cp -rL /plan /tmp/plan && cd /tmp/plan" in pod["command"][-1]


def test_the_measuring_script_writes_a_row_that_validate_reads(plain_plan, tmp_path):
    (tmp_path / "measure.py").write_text(export_folder(plain_plan, "deepspeed")["measure.py"])
    (tmp_path / "log").write_text(
        "\n".join(f"step {n}: {t} s, peak 15.5 GiB" for n, t in enumerate((40.0, 14.0, 14.2), 1))
    )
    done = subprocess.run(
        [sys.executable, "measure.py", "log"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "14.1" in done.stdout
    (row,) = read_table(tmp_path / "measured.csv").rows
    run = run_of(row)
    plan = plain_plan
    fixed = {name: str(value).lower() for name, value in run.problem.fixed.items()}
    for knob in ("tp", "cp", "pp"):
        assert int(fixed[knob]) == plan.mesh[knob]
    assert (fixed["zero_stage"], fixed["recompute"], fixed["sequence_parallel"]) == ("2", "full", "false")
    assert parameter_count(run.problem.model) == parameter_count(planner.load_model("llama3-8b"))
    # The median of the steps after the first third: 14.0 and 14.2 s.
    assert float(row.text("step_time_s")) == pytest.approx(14.1)


@pytest.mark.parametrize(
    ("choices", "cell"),
    [
        ({}, None),
        ({"optimizer_offload": "cpu", "zero_stage": 1}, "optimizer"),
        ({"parameter_offload": "cpu", "zero_stage": 3}, "params"),
        ({"optimizer_offload": "cpu+gradients", "zero_stage": 2}, "optimizer_offload=cpu+gradients"),
        (
            {"optimizer_offload": "nvme", "parameter_offload": "nvme", "zero_stage": 3},
            "optimizer_offload=nvme; parameter_offload=nvme",
        ),
    ],
)
def test_a_row_says_what_was_offloaded_and_reads_so(choices, cell, tmp_path):
    plan = plan_of(zero_group="full", sequence_parallel="false", micro_batch_size=2, **choices)
    text = export_folder(plan, "deepspeed")["measure.py"]
    settings = json.loads(text.split("'''")[1].replace("\\\\", "\\"))
    row = {key: str(value) for key, value in settings["row"].items()} | {"step_time_s": "1.0"}
    assert row.get("offload") == (cell or "none")
    (tmp_path / "rows.csv").write_text(",".join(row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n")
    fixed = run_of(read_table(tmp_path / "rows.csv").rows[0]).problem.fixed
    wanted = {name: value for name, value in choices.items() if name.endswith("_offload")}
    assert {
        name: fixed[name] for name in fixed if name.endswith("_offload") and fixed[name] != "none"
    } == wanted


# -- and back ---------------------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    (
        "deepspeed",
        "deepspeed.json",
        {"zero_stage": 2, "micro_batch_size": 2, "tp": 2, "sequence_parallel": "false"},
    ),
    ("deepspeed", "deepspeed.json", {"zero_stage": 2, "optimizer_offload": "cpu+gradients"}),
    ("deepspeed", "deepspeed.json", {"zero_stage": 1, "optimizer_offload": "cpu"}),
    ("deepspeed", "deepspeed.json", {"zero_stage": 1, "cp": 4, "context": "a2a", "optimizer": "lion"}),
    ("accelerate", "accelerate.yaml", {"tp": 2, "recompute": "full", "gradient_dtype": "bf16", **SHARDED}),
    (
        "accelerate",
        "accelerate.yaml",
        {"cp": 2, "context": "p2p", "gradient_dtype": "bf16", **SHARDED, **PLAIN},
    ),
    (
        "torchtitan",
        "run.sh",
        {"tp": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 2, "zero_stage": 1},
    ),
    ("torchtitan", "flags.txt", {"tp": 2, "tensor_overlap": "chunked", "zero_stage": "fsdp"}),
    ("torchtitan", "run.sh", {"pp": 4, "schedule": "breadth_first", "virtual_stages": 2, "zero_stage": 1}),
]


@pytest.mark.parametrize(("name", "file", "choices"), ROUND_TRIPS, ids=str)
def test_what_was_written_is_read(name, file, choices, tmp_path):
    plan = plan_of(**choices)
    (tmp_path / file).write_text(export(plan, name)[file])
    run = read_launched(name, tmp_path / file)
    meant = {knob: str(value).lower() for knob, value in {**plan.mesh, **plan.knobs}.items()}
    assert {knob: str(value).lower() for knob, value in run.fixed.items() if knob != "etp"} == {
        knob: meant[knob] for knob in run.fixed if knob != "etp"
    }
    assert run.devices in (None, plan.devices)


SCRIPTS = [
    ("deepspeed", "run.sh", {"zero_stage": 3, "recompute": "block", "recompute_layers": 20}),
    ("deepspeed", "run.sh", {"zero_stage": 1, "micro_batch_size": 2, **PLAIN}),
    ("accelerate", "run.sh", {"recompute": "block", "recompute_layers": 20, **SHARDED}),
    ("accelerate", "run.sh", {"zero_stage": 0, "recompute": "full", "sequence_parallel": "false", **PLAIN}),
    ("transformers", "training_arguments.json", {"recompute": "full", "zero_group": "node", **SHARDED}),
    ("transformers", "training_arguments.json", {"tp": 2, "gradient_dtype": "bf16", **SHARDED, **PLAIN}),
]


@pytest.mark.parametrize(("name", "file", "choices"), SCRIPTS, ids=str)
def test_a_folder_is_priced_as_the_plan_was(name, file, choices, tmp_path):
    """Step time and peak come back, so that every choice that is priced did; batch and length too."""
    model = "llama3.2-1b" if choices["zero_stage"] == 0 else "llama3-8b"
    plan = plan_of(model, batch=768, **choices)
    for written, text in export(plan, name).items():
        (tmp_path / written).write_text(text)
    run = read_launched(name, tmp_path / file)
    assert (run.workload["global_batch_size"], run.workload["seq_len"], run.devices) == (768, 8192, 64)
    assert run.missing == {}
    again = planner.estimate(problem_of(model, batch=768, **{**run.fixed, "etp": plan.mesh["etp"]}))
    assert again.estimate.step_time_s == pytest.approx(plan.estimate.step_time_s)
    assert again.estimate.memory_bytes["peak"] == pytest.approx(plan.estimate.memory_bytes["peak"])


def test_auto_is_filled_in_as_the_trainer_does(tmp_path):
    """Transformers' documentation of DeepSpeed: micro-batch, accumulation and formats come from the command line."""
    file = {
        "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(file))
    (tmp_path / "job.sh").write_text(
        "NODES=4\ndeepspeed --num_nodes $NODES --num_gpus 8 \\\n  run_clm.py --deepspeed ds.json --bf16 True \\\n"
        "  --per_device_train_batch_size 2 --gradient_accumulation_steps 3 --block_size 4096 --learning_rate 1e-5\n"
    )
    run = read_launched("deepspeed", tmp_path / "job.sh")
    # 4 nodes of 8, each 2 sequences at a time, 3 times a step.
    assert (run.devices, run.fixed["dp"], run.workload["global_batch_size"]) == (32, 32, 192)
    assert (run.fixed["micro_batch_size"], run.fixed["precision"], run.workload["seq_len"]) == (
        2,
        "bf16",
        4096,
    )
    assert (run.fixed["recompute"], run.fixed["elementwise_kernel"]) == ("none", "eager")
    assert run.missing == {}


def test_accelerate_starts_deepspeed(tmp_path):
    """The questionnaire of accelerate config writes such a file; recipes of alignment-handbook and TRL are of this kind."""
    (tmp_path / "zero3.yaml").write_text(
        "distributed_type: DEEPSPEED\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 8\ndeepspeed_config:\n"
        "  deepspeed_multinode_launcher: standard\n  offload_optimizer_device: cpu\n  offload_param_device: none\n"
        "  zero3_init_flag: true\n  zero_stage: 3\n"
    )
    run = read_launched("accelerate", tmp_path / "zero3.yaml")
    assert (run.launcher, run.devices, run.fixed["zero_stage"], run.fixed["precision"]) == (
        "deepspeed",
        8,
        "3",
        "bf16",
    )
    assert (run.fixed["optimizer_offload"], run.fixed["parameter_offload"]) == ("cpu+gradients", "none")
    assert set(run.missing) == {"micro_batch_size", "global_batch_size"}


def test_a_script_without_a_configuration_says_what_it_lacks(tmp_path):
    (tmp_path / "job.sh").write_text("torchrun train.py --lr 1\n")
    with pytest.raises(SpecError, match="names no file with --deepspeed"):
        read_launched("deepspeed", tmp_path / "job.sh")
    (tmp_path / "job.sh").write_text("torchrun train.py --deepspeed none.json\n")
    with pytest.raises(SpecError, match=r"none\.json: no such file"):
        read_launched("deepspeed", tmp_path / "job.sh")


def test_galvatron_comes_back(tmp_path):
    plan = plan_of("llama2-7b", seq_len=4096, tp=2, pp=4, zero_stage=3, recompute="full")
    (tmp_path / "g.json").write_text(export(plan, "galvatron")["galvatron.json"])
    run = read_launched("galvatron", tmp_path / "g.json")
    assert (run.fixed["tp"], run.fixed["pp"], run.fixed["zero_stage"], run.fixed["recompute"]) == (
        2,
        4,
        "3",
        "full",
    )
    assert run.micro_batches == plan.micro_batches


def test_layers_that_differ_in_a_schedule_that_is_not_theirs_are_named(tmp_path):
    strategy = {
        "pp_deg": 2,
        "tp_sizes_enc": "1,2",
        "tp_consecutive_flags": "1,1",
        "global_bsz": 8,
        "chunks": 1,
    }
    (tmp_path / "g.json").write_text(json.dumps(strategy))
    with pytest.raises(SpecError, match="pipeline_type: gpipe with layers of unlike degrees"):
        read_launched("galvatron", tmp_path / "g.json")


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "deepspeed": {
        "": "is empty",
        "{": "is not valid JSON",
        "[1]": "holds a list",
        '{"zero_optimization": {"stge": 2}}': "unknown key, which DeepSpeed refuses. Did you mean stage",
        '{"zero_optimization": {"stage": "auto"}}': "'auto', which only the Trainer fills in",
        '{"zero_optimization": [2]}': "expected a table",
        '{"bf16": {"enabled": true}, "fp16": {"enabled": true}}': "is enabled beside bf16",
    },
    "accelerate": {
        "- a\n- b\n": "holds a list; expected a map",
        "a: [1\n": "is not valid YAML",
        "distributed_type: FSPD\n": "Did you mean FSDP",
        "distributed_type: FSDP\nfsdp_config:\n- a\n": "expected a table",
        "distributed_type: NO\nnum_proceses: 8\n": "unknown key, which Accelerate refuses. Did you mean num_processes",
    },
    "torchtitan": {"--config llama3_9b": "Did you mean llama3_8b", "echo nothing": "starts no torchtitan"},
    "galvatron": {"{}": "pp_deg: is missing"},
    "megatron": {"torchrun train.py": "starts no training script"},
    "transformers": {
        "- a\n": "holds a list; expected a map",
        "learning_rate: 1\n": "names no per_device_train_batch_size",
        "per_device_train_batch_size: [2]\n": "expected a whole number",
        "per_device_train_batch_size: 2\nfsdp: true\nfsdp_config: [a]\n": "expected a table",
    },
}
"""Launcher → a file that is wrong → what is said of it."""


@pytest.mark.parametrize(
    ("name", "text", "why"), [(name, text, why) for name, files in BAD.items() for text, why in files.items()]
)
def test_a_bad_file_gets_one_clear_message(name, text, why, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(SpecError) as error:
        read_launched(name, tmp_path / "file")
    assert why in str(error.value)


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_file_of_fifty_megabytes_is_refused_by_its_size(name, tmp_path):
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(50 * 2**20)
    with pytest.raises(SpecError, match="holds 52,428,800 bytes"):
        read_launched(name, tmp_path / "large")


FIELD = """#!/bin/bash
GPUS_PER_NODE=8
NNODES=${SLURM_NNODES:-4}
MODEL_ARGS="
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 \\
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 \\
    --seq-length 8192 --swiglu --normalization RMSNorm --disable-bias-linear \\
    --untie-embeddings-and-output-weights --position-embedding-type rope
"
PARALLEL_ARGS=(
    --tensor-model-parallel-size ${1:-4}
    --sequence-parallel   # needed
)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES \\
    --master_addr $(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) pretrain_gpt.py \\
    $MODEL_ARGS "${PARALLEL_ARGS[@]}" --micro-batch-size 1 \\
    --global-batch-size $(( (NNODES * GPUS_PER_NODE) * 8 )) \\
    --bf16 --vocab-size 128256 --foo-bar 3 $EXTRA_ARGS 2>&1 | tee train.log
"""


def test_a_script_with_sums_and_substitutions_in_its_words(tmp_path):
    (tmp_path / "run.sh").write_text(FIELD)
    run = read_launched("megatron", tmp_path / "run.sh")
    # Four nodes of eight, and eight sequences for each device.
    assert (run.devices, run.workload["global_batch_size"], run.fixed["tp"]) == (32, 256, 4)
    assert run.ignored == ("--foo-bar",)


def test_auto_is_left_open_and_asked_for(tmp_path):
    (tmp_path / "d.json").write_text(
        '{"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 64, "bf16": {"enabled": true}}'
    )
    run = read_launched("deepspeed", tmp_path / "d.json")
    assert run.missing == {"micro_batch_size": "train_micro_batch_size_per_gpu is auto"}


def test_unknown_keys_at_the_top_are_listed_with_what_was_meant(tmp_path):
    (tmp_path / "d.json").write_text('{"train_batch_size": 64, "zero_optimisation": {"stage": 3}}')
    run = read_launched("deepspeed", tmp_path / "d.json")
    assert "perhaps zero_optimization" in run.ignored[0]


# -- check ------------------------------------------------------------------------------------------------------------


def checked(launcher, **choices):
    problem = problem_of(**choices)
    return findings(problem, LaunchedRun(launcher, problem.model, {}, problem.fixed, None))


def test_check_names_the_layer_that_would_have_caught_it():
    # Two micro-batches on four stages: Megatron-LM's parser takes them, schedules.py refuses them at the first step.
    found, plan = checked(
        "megatron",
        batch=2,
        cluster="h100-sxm:1x4",
        pp=4,
        virtual_stages=2,
        schedule="interleaved",
        micro_batch_size=1,
    )
    assert plan is None
    assert any("schedules.py" in finding.caught_by for finding in found)
    found, plan = checked("megatron", zero_stage=3, pp=2)
    assert plan is not None
    assert any(f.level == "error" and "Megatron-FSDP's wrapper" in f.caught_by for f in found)


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"micro_batch_size": 5}, "a global batch of 768 is no whole number"),
        ({"tp": 3}, "devices do not divide among"),
    ],
)
def test_check_names_what_cannot_be_dealt(choices, why):
    ((finding,), plan) = checked("megatron", **choices)
    assert plan is None
    assert finding.what.startswith(why)
    assert finding.caught_by == "validate_args"


def test_check_says_what_does_not_fit():
    found, _ = checked("megatron", model="llama3.1-405b", zero_stage=0)
    assert any("does not fit" in finding.what for finding in found)


def test_gains_add_up_to_the_best_plan():
    problem = problem_of(tp=8, recompute="full", zero_stage=1)
    plan, best = planner.estimate(problem), plan_of(tp=1, recompute="none", zero_stage=1, micro_batch_size=1)
    steps = path_to(problem, plan, best)
    assert steps[0].before_s == plan.estimate.step_time_s
    assert steps[-1].after_s == best.estimate.step_time_s
    gained = sum(step.before_s - step.after_s for step in steps)
    assert gained == pytest.approx(plan.estimate.step_time_s - best.estimate.step_time_s)
    assert {name for step in steps for name in step.knobs} >= {"tp", "recompute"}


def test_every_layer_is_of_a_launcher_that_can_be_read():
    assert set(CAUGHT) <= set(LAUNCHERS)
    assert set(READERS) <= set(CAUGHT)


def test_every_reason_that_is_caught_is_given_somewhere():
    root = Path(planner.__file__).parent
    texts = [path.read_text() for path in root.rglob("*.py") if path.name != "caught.py"]
    for table in CAUGHT.values():
        for start in table:
            assert any(f'"{start}' in text for text in texts), start
