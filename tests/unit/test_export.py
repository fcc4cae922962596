"""Exports: every choice of a plan becomes the launcher's own words, and comes back from them unchanged."""

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import planner
from planner.errors import ExportError, SpecError
from planner.export import export, export_folder
from planner.export.flags import parse_flags
from planner.export.launchers import LAUNCHERS, launcher
from planner.export.megatron_import import read_megatron
from planner.export.megatron_model import inexpressible
from planner.export.shell import devices_of, read_script
from planner.specs.models import list_models
from planner.technique import off

CASES = json.loads((Path(__file__).parents[1] / "data" / "megatron_plans.json").read_text())
NOT_IN_FLAGS = {
    "name": "", "family": "", "source": "", "exception": "", "published_parameters": None, "published_digits": 0,
    "published_active_parameters": None, "published_active_digits": 0, "extras": {}, "mtp_layers": 0, "checkpoint": "bf16",
}  # fmt: skip


def plan_of(model="llama3-8b", cluster="h100-sxm:8x8", batch=768, seq_len=None, **fixed):
    loaded = planner.load_model(model)
    workload = planner.TrainWorkload(
        batch, seq_len or min(loaded.max_seq_len, 8192), optimizer=fixed.get("optimizer", "adamw"),
        precisions=(fixed.get("precision", "bf16"),), capacity_factor=fixed.pop("capacity_factor", None),
    )  # fmt: skip
    return planner.estimate(
        planner.Problem(loaded, planner.load_cluster(cluster), workload, planner.load_stack(), fixed=fixed)
    )


def flags_of(plan, **options):
    return parse_flags(shlex.split(export(plan, "megatron", **options)["args.txt"]))


def refusals(plan, to="megatron"):
    with pytest.raises(ExportError) as error:
        export(plan, to)
    return str(error.value)


# -- Megatron-LM: the words, as its --help has them ------------------------------------------------------------------


def test_mesh_and_batch():
    flags = flags_of(plan_of(tp=4, cp=2, pp=2))
    expected = {
        "--tensor-model-parallel-size": "4",
        "--context-parallel-size": "2",
        "--pipeline-model-parallel-size": "2",
        "--cp-comm-type": "p2p",
        "--micro-batch-size": "1",
        "--global-batch-size": "768",
        "--seq-length": "8192",
    }
    assert {flag: flags[flag] for flag in expected} == {flag: [value] for flag, value in expected.items()}
    assert "--sequence-parallel" in flags
    assert "--num-virtual-stages-per-pipeline-rank" not in flags


def test_llama_architecture():
    # Grouped queries, gated feed-forward, no biases, untied: arXiv:2407.21783 Table 3.
    flags = flags_of(plan_of())
    sizes = {
        "--num-layers": 32,
        "--hidden-size": 4096,
        "--ffn-hidden-size": 14336,
        "--num-attention-heads": 32,
    }
    sizes |= {"--num-query-groups": 8, "--kv-channels": 128, "--vocab-size": 128256}
    assert {flag: int(flags[flag][0]) for flag in sizes} == sizes
    for switch in (
        "--swiglu",
        "--group-query-attention",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
    ):
        assert flags[switch] == []
    assert flags["--normalization"] == ["RMSNorm"]
    assert flags["--position-embedding-type"] == ["rope"]


def test_gpt_architecture():
    flags = flags_of(plan_of("gpt3-175b", "a100-sxm-80gb:16x8", tp=8, pp=8))
    assert not {"--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"} & set(flags)
    assert flags["--normalization"] == ["LayerNorm"]
    assert flags["--position-embedding-type"] == ["learned_absolute"]
    assert flags["--attention-dropout"] == ["0.1"]


def test_latent_attention_and_mixed_experts():
    # DeepSeek-V3: arXiv:2412.19437 §4.2, three dense layers before 58 with experts.
    flags = flags_of(
        plan_of("deepseek-v3", "h100-sxm:64x8", 3840, 4096, tp=2, pp=16, ep=16, pipeline_layout="balanced")
    )
    assert flags["--moe-layer-freq"] == ["([0]*3+[1]*58)"]
    assert (flags["--q-lora-rank"], flags["--kv-lora-rank"]) == (["1536"], ["512"])
    assert (flags["--ffn-hidden-size"], flags["--moe-ffn-hidden-size"]) == (["18432"], ["2048"])
    assert flags["--moe-shared-expert-intermediate-size"] == ["2048"]
    assert "--group-query-attention" not in flags
    assert flags["--expert-model-parallel-size"] == ["16"]
    assert flags["--expert-tensor-parallel-size"] == ["1"]


def test_windows_alternate():
    # gpt-oss: every other layer sees 128 tokens, 127 of them before the query (arXiv:2508.10925 §2).
    flags = flags_of(plan_of("gpt-oss-20b", tp=2))
    assert flags["--window-size"] == ["127,0"]
    assert flags["--window-attn-skip-freq"][0].startswith("([1]*1+[0]*1+")
    assert flags["--softmax-type"] == ["learnable"]


@pytest.mark.parametrize(
    ("stage", "group", "expected", "absent"),
    [
        (0, "full", {"--overlap-grad-reduce"}, {"--use-distributed-optimizer", "--use-megatron-fsdp"}),
        (1, "full", {"--use-distributed-optimizer", "--overlap-param-gather"}, {"--use-megatron-fsdp"}),
        (1, "node", {"--num-distributed-optimizer-instances 8"}, {"--use-megatron-fsdp"}),
        (2, "full", {"--use-megatron-fsdp", "--data-parallel-sharding-strategy optim_grads"}, set()),
        (
            3,
            "full",
            {"--data-parallel-sharding-strategy optim_grads_params", "--ckpt-format fsdp_dtensor"},
            set(),
        ),
        (3, "node", {"--num-distributed-optimizer-instances 8"}, set()),
    ],
)
def test_what_is_sharded(stage, group, expected, absent):
    # 64 replicas in nodes of 8: eight copies of the states under hybrid sharding.
    lines = set(export(plan_of(zero_stage=stage, zero_group=group), "megatron")["args.txt"].splitlines())
    assert expected <= lines
    assert not absent & lines


@pytest.mark.parametrize(
    ("model", "recompute", "expected"),
    [
        (
            "llama3-8b",
            "full",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        ("llama3-8b", "mlp", "--recompute-granularity selective --recompute-modules mlp"),
        ("mixtral-8x7b", "mlp", "--recompute-granularity selective --recompute-modules moe"),
        ("mixtral-8x7b", "act", "--recompute-granularity selective --recompute-modules moe_act"),
    ],
)
def test_recompute(model, recompute, expected):
    text = " ".join(export(plan_of(model, tp=8, recompute=recompute), "megatron")["args.txt"].split())
    assert expected in text


def test_recomputed_layers_are_counted_per_virtual_stage():
    plan = plan_of("llama3.1-70b", tp=8, pp=4, virtual_stages=2, recompute="block", recompute_layers=6)
    assert flags_of(plan)["--recompute-num-layers"] == ["3"]  # Megatron-LM counts in each of the two chunks
    odd = plan_of("llama3.1-70b", tp=8, pp=4, virtual_stages=2, recompute="block", recompute_layers=5)
    assert "per virtual stage" in refusals(odd)


def test_stages_that_make_room_for_the_ends():
    # Llama 3 405B: 126 layers are 16·8 with one fewer on both ends.
    flags = flags_of(plan_of("llama3.1-405b", "h100-sxm:16x8", tp=8, pp=16, pipeline_layout="short_ends"))
    assert {
        "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split",
    } <= set(flags)
    assert "--pipeline-model-parallel-layout" not in flags


def test_groups_of_micro_batches_that_pp_does_not_divide():
    # 5 micro-batches on 4 stages: Megatron-LM takes groups of 4 to 5 that leave no rest of 1 to 3, which is 5 alone.
    flag = "--microbatch-group-size-per-virtual-pipeline-stage"
    shape = {"tp": 2, "pp": 4, "virtual_stages": 4}
    assert flags_of(plan_of("llama3-8b", batch=40, **shape))[flag] == ["5"]
    assert flag not in flags_of(plan_of("llama3-8b", batch=64, **shape))


def test_other_uneven_stages_are_written_out():
    # 80 layers on six stages: 13 or 14, the longer ones in the middle.
    flags = flags_of(plan_of("qwen2.5-72b", "h100-sxm:6x8", tp=4, pp=6, pipeline_layout="balanced"))
    assert flags["--pipeline-model-parallel-layout"] == ["Et*13|t*13|t*14|t*14|t*13|t*13L"]
    assert not any("account" in flag for flag in flags)


@pytest.mark.parametrize(
    ("precision", "cluster", "expected"),
    [
        ("fp16", "h100-sxm:8x8", {"--fp16", "--accumulate-allreduce-grads-in-fp32"}),
        ("fp8", "h100-sxm:8x8", {"--bf16", "--fp8-format hybrid", "--fp8-recipe tensorwise"}),
        ("mxfp8", "b200:8x8", {"--bf16", "--fp8-format e4m3", "--fp8-recipe mxfp8"}),
        ("nvfp4", "b200:8x8", {"--bf16", "--fp4-format e2m1", "--fp4-recipe nvfp4"}),
    ],
)
def test_precision(precision, cluster, expected):
    files = export(plan_of(cluster=cluster, tp=2, precision=precision), "megatron")
    assert expected <= set(files["args.txt"].splitlines())
    # One hardware queue keeps launches in order; since Blackwell it is not needed (megatron/training/arguments.py).
    assert ("export CUDA_DEVICE_MAX_CONNECTIONS=1" in files["run.sh"]) == (cluster == "h100-sxm:8x8")


def test_experts_are_capped():
    flags = flags_of(plan_of("mixtral-8x7b", tp=2, ep=8, capacity_factor=1.25))
    assert flags["--moe-expert-capacity-factor"] == ["1.25"]
    assert "--moe-pad-expert-input-to-capacity" in flags


@pytest.mark.parametrize(
    ("cluster", "fixed", "said"),
    [
        ("h100-sxm:8x8", {}, "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep"),
        (
            "h100-sxm:8x8",
            {"dispatch": "deepep"},
            "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
        ),
        ("h100-sxm:8x8", {"dispatch": "copied"}, "--moe-token-dispatcher-type alltoall"),
        ("a100-sxm-80gb:8x8", {}, "--moe-token-dispatcher-type alltoall"),  # no kernels of either for Ampere
    ],
)
def test_tokens_go_to_experts_as_they_are_priced(cluster, fixed, said, tmp_path):
    """Megatron-Core, core/transformer/transformer_config.py: moe_token_dispatcher_type, moe_flex_dispatcher_backend."""
    text = export(plan_of("mixtral-8x7b", cluster, tp=2, ep=8, **fixed), "megatron")["args.txt"]
    assert said in " ".join(text.split())
    assert ("--moe-flex-dispatcher-backend" in text) == ("flex" in said)
    (tmp_path / "args.txt").write_text(text)
    read = read_megatron(tmp_path / "args.txt").fixed.get("dispatch", "fused")
    assert read == (fixed.get("dispatch", "fused") if "h100" in cluster else "copied")


@pytest.mark.parametrize("stream", ["priority", "plain"])
def test_overlapped_exchanges_have_the_stream_that_they_are_priced_with(stream, tmp_path):
    """Megatron-Core, core/transformer/transformer_config.py: high_priority_a2a_comm_stream."""
    fixed = {
        "tp": 2,
        "ep": 8,
        "pp": 2,
        "virtual_stages": 2,
        "expert_overlap": "combined_1f1b",
        "exchange_stream": stream,
    }
    text = export(plan_of("mixtral-8x7b", **fixed), "megatron")["args.txt"]
    assert "--overlap-moe-expert-parallel-comm" in text
    assert ("--high-priority-a2a-comm-stream" in text) == (stream == "priority")
    (tmp_path / "args.txt").write_text(text)
    assert read_megatron(tmp_path / "args.txt").fixed.get("exchange_stream", "priority") == stream


def test_tokens_that_are_padded_to_a_capacity_do_not_go_by_deepep():
    # transformer_config.py: "Flex token dispatcher with deepep backend does not support moe_pad_expert_input_to_capacity"
    said = refusals(plan_of("mixtral-8x7b", tp=2, ep=8, capacity_factor=1.25, dispatch="deepep"))
    assert "DeepEP does not pad" in str(said)


def test_optimizer_on_the_host():
    flags = flags_of(plan_of(tp=2, optimizer_offload="cpu"))
    assert flags["--optimizer-offload-fraction"] == ["1.0"]
    assert {
        "--optimizer-cpu-offload",
        "--use-precision-aware-optimizer",
        "--use-distributed-optimizer",
    } <= set(flags)


# -- what is refused is named ----------------------------------------------------------------------------------------


def test_every_inexpressible_feature_is_named():
    plan = plan_of(
        pp=4, schedule="gpipe", activation_offload="cpu", parameter_offload="cpu", zero_stage="fsdp"
    )
    text = refusals(plan)
    for feature in ("schedule=gpipe", "activation_offload=cpu", "parameter_offload=cpu", "zero_stage=fsdp"):
        assert feature in text


@pytest.mark.parametrize(
    ("why", "choices"),
    [
        ("not with pipelines", {"zero_stage": 3, "pp": 2}),
        ("keeps its optimizer on the device", {"zero_stage": 3, "optimizer_offload": "cpu"}),
        ("needs the distributed optimizer", {"zero_stage": 0, "optimizer_offload": "cpu"}),
        ("norms fused", {"recompute": "norm"}),
        ("only the experts' activation", {"recompute": "act"}),
        ("optimizer=lamb", {"optimizer": "lamb"}),
        ("KV heads per rank not divisible by cp", {"tp": 4, "cp": 8, "context": "a2a"}),
        ("tensor-parallel overlap", {"tp": 2, "zero_stage": 2, "tensor_overlap": "chunked"}),
    ],
)
def test_rules_of_megatron(why, choices):
    assert why in refusals(plan_of(**choices))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("t5-11b", "encoder-decoder models"),
        ("mamba2-1.3b", "state-space layers"),
        ("gemma2-9b", "4 norms per layer"),
        ("falcon-7b", "attention beside the feed-forward network"),
        ("dbrx", "layernorm_nobias"),
        ("bloom-7b1", "parameters beside the embedding"),
        ("olmo2-7b", "query-key norms over all heads"),
    ],
)
def test_models_without_flags(model, why):
    assert why in "; ".join(inexpressible(planner.load_model(model)))


def test_most_decoders_have_flags():
    expressible = [name for name in list_models() if not list(inexpressible(planner.load_model(name)))]
    assert {"llama2-70b", "qwen3-235b-a22b", "mixtral-8x22b", "deepseek-v2", "gpt2", "nemotron4-340b"} <= set(
        expressible
    )


def test_an_unknown_launcher_is_a_user_error():
    with pytest.raises(SpecError, match="megatron"):
        export(plan_of(), "megatorn")
    with pytest.raises(SpecError, match="deepspeed, fsdp, galvatron, megatron"):
        launcher("slurm")


def test_other_accelerators_do_not_run_megatron():
    assert "not on" in refusals(plan_of(cluster="tpu-v5p:16x4", batch=64, seq_len=4096))


# -- the script runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[6], CASES[9], CASES[14]], ids=str)
def test_the_shell_passes_the_arguments_on(case, tmp_path):
    """bash itself reads run.sh, with a torchrun that prints what it is given."""
    plan = plan_of(case["model"], case["cluster"], **case["fixed"])
    for name, text in export(plan, "megatron").items():
        (tmp_path / name).write_text(text)
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DATA_ARGS": "--data-path my/data",
        "MEGATRON_PATH": ".",
    }
    environment |= {"NODE_RANK": "0", "MASTER_ADDR": "node0"}
    command = ["bash", "run.sh", "--lr", "3e-4"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    words = done.stdout.splitlines()
    launch, given = (
        words[: words.index("./pretrain_gpt.py")],
        parse_flags(words[words.index("./pretrain_gpt.py") :]),
    )
    assert ["--nnodes", str(plan.devices // 8), "--nproc-per-node", "8"] == launch[:4]
    expected = parse_flags(shlex.split((tmp_path / "args.txt").read_text()))
    assert {flag: given[flag] for flag in expected} == expected
    assert (given["--data-path"], given["--lr"]) == (["my/data"], ["3e-4"])
    assert "--mock-data" not in given


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR", "MEGATRON_PATH"])
def test_a_node_that_does_not_know_its_place_says_so(missing, tmp_path):
    """Sixteen nodes that each take themselves for the first would wait for each other."""
    for name, text in export(plan_of(CASES[6]["model"], "h100-sxm:16x8"), "megatron").items():
        (tmp_path / name).write_text(text)
    known = {"PATH": os.environ["PATH"], "NODE_RANK": "3", "MASTER_ADDR": "node0", "MEGATRON_PATH": "."}
    del known[missing]
    done = subprocess.run(
        ["bash", "run.sh"], cwd=tmp_path, env=known, capture_output=True, text=True, timeout=20
    )
    assert done.returncode != 0
    assert missing in done.stderr


# -- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["run.sh", "args.txt"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['model']}-{len(case['fixed'])}")
def test_round_trip(case, file, tmp_path):
    plan = plan_of(case["model"], case["cluster"], **case["fixed"])
    (tmp_path / file).write_text(export(plan, "megatron")[file])
    run = read_megatron(tmp_path / file)
    choices = {name: str(value).lower() for name, value in {**plan.mesh, **plan.knobs}.items()}
    assert {name: str(value).lower() for name, value in run.fixed.items()} == {
        name: choices[name] for name in run.fixed
    }
    # What the flags do not name is off, or the one way that Megatron-LM knows.
    unnamed = {*plan.mesh, *plan.knobs} - {*run.fixed} - {"tensor", "expert", "pipeline"}
    assert {name for name in unnamed if choices[name] != off(name)} <= (
        {"dp"} if file == "args.txt" else set()
    )
    assert run.devices == (plan.devices if file == "run.sh" else None)
    assert {name: plan.workload[name] for name in ("global_batch_size", "seq_len", "optimizer")} == {
        name: run.workload[name] for name in ("global_batch_size", "seq_len", "optimizer")
    }
    assert replace(run.model, **NOT_IN_FLAGS) == replace(planner.load_model(case["model"]), **NOT_IN_FLAGS)


def test_an_imported_run_is_the_same_plan(tmp_path):
    plan = plan_of("llama3.1-70b", tp=8, pp=4, virtual_stages=5, tensor_overlap="chunked")
    (tmp_path / "run.sh").write_text(export(plan, "megatron")["run.sh"])
    run = read_megatron(tmp_path / "run.sh")
    workload, cluster = planner.TrainWorkload(**run.workload), planner.load_cluster("h100-sxm:8x8")
    problem = planner.Problem(run.model, cluster, workload, planner.load_stack(), fixed=run.fixed)
    again = planner.estimate(problem)
    assert again.estimate == plan.estimate
    assert again.stages == plan.stages


SCRIPT = """#!/bin/bash
# A launch as Megatron-LM's examples have it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NUM_NODES=${NUM_NODES:-4}
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))
TOKENIZER=${1:-"MOCK"}
TP=2
DTYPE="fp8"

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --master_addr ${MASTER_ADDR:-localhost}   # first node
)
GPT_MODEL_ARGS=(
    --num-layers 24
    --hidden-size 2048
    --num-attention-heads 16
    --seq-length 4096
    --max-position-embeddings 4096   # --num-layers 99
    # --swiglu
    --position-embedding-type rope
)
DTYPE_ARGS=()
if [[ "$DTYPE" == "fp8" ]]; then
    DTYPE_ARGS+=("--fp8-format hybrid" "--fp8-recipe delayed")
else
    DTYPE_ARGS+=(--fp16)
fi
if [[ "$TOKENIZER" == "MOCK" ]] || [[ -z "$TOKENIZER" ]]; then
    DATA=(--mock-data --vocab-size 50304)
else
    DATA=(--data-path $TOKENIZER)
fi
OPTIONS="--bf16 --micro-batch-size 2 \\
    --global-batch-size $((WORLD_SIZE*4))"
OPTIONS="$OPTIONS --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
mkdir -p logs && echo "starting $WORLD_SIZE"

torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \\
    ${GPT_MODEL_ARGS[@]} ${DTYPE_ARGS[@]} ${DATA[@]} $OPTIONS \\
    --tensor-model-parallel-size $TP --sequence-parallel --lr=1e-4 \\
    --recompute-granularity full --recompute-method block --recompute-num-layers 4 \\
    "$@" 2>&1 | tee logs/out.txt
"""


@pytest.fixture
def script(tmp_path):
    def write(text=SCRIPT):
        path = tmp_path / "train.sh"
        path.write_text(text)
        return path

    return write


def test_a_script_is_read_as_the_shell_reads_it(script):
    run = read_megatron(script())
    assert run.devices == 32
    assert run.workload["global_batch_size"] == 128
    expected = {
        "tp": 2,
        "pp": 1,
        "dp": 16,
        "micro_batch_size": 2,
        "precision": "fp8",
        "zero_stage": "1",
        "recompute": "block",
    }
    assert {name: run.fixed[name] for name in expected} == expected
    assert run.fixed["recompute_layers"] == 4
    model = run.model
    assert (model.n_layers, model.hidden, model.vocab, model.learned_positions) == (24, 2048, 50304, 0)
    block = model.blocks["dense"]
    assert (block.mlp.ffn, block.mlp.gated, block.mlp.bias) == (
        4 * 2048,
        False,
        True,
    )  # Megatron-LM's defaults
    assert (block.norm, block.attention.kv_heads, block.attention.head_dim) == ("layernorm", 16, 128)
    assert model.tied_embeddings
    assert run.ignored == ("--lr", "--mock-data")


def test_the_environment_may_set_variables(script):
    run = read_megatron(script(), {"NUM_NODES": "16", "1": "my/tokens"})
    assert run.devices == 128
    assert run.model.vocab == 50257  # the default tokenizer's, where no size is given
    assert "--data-path" in run.ignored


def test_batch_system_directives_count_devices(script):
    text = SCRIPT.replace(
        "#!/bin/bash", "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --gpus-per-node=4  # all of them"
    )
    text = text.replace("torchrun ${DISTRIBUTED_ARGS[@]}", "srun python")
    assert read_megatron(script(text)).devices == 8


def test_a_condition_that_cannot_be_decided_is_noted(script):
    run = read_megatron(script(SCRIPT.replace("torchrun", "if [ -d /data ]; then\n  TP=4\nfi\ntorchrun")))
    assert run.fixed["tp"] == 2
    assert any("-d /data" in note for note in run.notes)


def test_devices_that_do_not_fit_are_left_open(script):
    run = read_megatron(
        script(SCRIPT.replace("--tensor-model-parallel-size $TP", "--pipeline-model-parallel-size 24 "))
    )
    assert run.devices is None
    assert "dp" not in run.fixed
    assert any("do not divide" in note for note in run.notes)


def test_what_is_wrong_is_said_at_once(script):
    text = SCRIPT.replace("--hidden-size 2048", "--hidden-size $HIDDEN").replace(
        "--seq-length 4096", "--hybrid-layer-pattern M*M*"
    )
    text = text.replace("--recompute-method block", "--recompute-method uniform")
    with pytest.raises(SpecError) as error:
        read_megatron(script(text))
    found = str(error.value)
    for flag in (
        "--hidden-size: no value",
        "--seq-length: is missing",
        "state-space layers",
        "--recompute-granularity",
    ):
        assert flag in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--lr=1e-4", "--fp8-recipe blockwise"), "not modelled"),
        (("--lr=1e-4", "--optimizer soap"), "soap"),
        (("--lr=1e-4", "--cp-comm-type ring --context-parallel-size 2"), "p2p"),
        (("--lr=1e-4", "--num-experts 8 --moe-layer-freq [0]*23"), "--moe-layer-freq"),
        (("--lr=1e-4", "--num-experts 8 --moe-layer-freq __import__('os')"), "--moe-layer-freq"),
        (("pretrain_gpt.py", "pretrain_gpt"), "no training script"),
    ],
)
def test_runs_that_are_not_modelled(script, change, message):
    with pytest.raises(SpecError, match=message):
        read_megatron(script(SCRIPT.replace(*change)))


def test_settings_before_a_command_are_of_the_command(tmp_path):
    """As in torchtitan's run_train.sh: they are no assignment of all that follows, and the command does not see them yet."""
    script = read_script(
        'NGPU=4\nexport A=1 B="2 3"\nNCCL_DEBUG=INFO X="a b" \\\n  torchrun --nproc_per_node=$NGPU $X train.py --b "$B"\n',
        "x.sh",
    )
    (command,) = script.commands
    assert command.words == ("torchrun", "--nproc_per_node=4", "train.py", "--b", "2 3")
    assert script.variables == {"NGPU": "4", "A": "1", "B": "2 3"}
    assert devices_of(script, command.words) == 4


def test_a_quote_that_does_not_close(script):
    with pytest.raises(SpecError, match="does not close"):
        read_megatron(script(SCRIPT + "\nX='open"))


def test_nothing_is_executed(tmp_path):
    marker = tmp_path / "ran"
    read = read_script(f"X=$(touch {marker})\nY=`touch {marker}`\necho $X$Y --flag", "x.sh")
    assert not marker.exists()
    assert read.commands[0].words == ("echo", "--flag")


def test_a_missing_file():
    with pytest.raises(SpecError, match="no such file"):
        read_megatron("/nowhere/run.sh")


# -- torchrun --------------------------------------------------------------------------------------------------------


def mesh_module(plan):
    namespace = {}
    exec(compile(export(plan, "torchrun")["mesh.py"], "mesh.py", "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    ("choices", "dimensions"),
    [
        ({"tp": 2, "cp": 2, "pp": 4}, {"pp": 4, "dp_replicate": 1, "dp_shard": 4, "cp": 2, "tp": 2}),
        ({"tp": 2, "zero_stage": 0}, {"pp": 1, "dp_replicate": 32, "dp_shard": 1, "cp": 1, "tp": 2}),
        # 64 replicas in nodes of 8: eight copies of the states, each in eight shards.
        (
            {"zero_stage": "fsdp", "zero_group": "node"},
            {"pp": 1, "dp_replicate": 8, "dp_shard": 8, "cp": 1, "tp": 1},
        ),
    ],
)
def test_device_mesh(choices, dimensions):
    assert mesh_module(plan_of(**choices))["PLAN"]["dimensions"] == dimensions


def test_fsdp_settings():
    # Stage 2 keeps weights whole between forward and backward (torch.distributed.fsdp.fully_shard).
    chosen = mesh_module(plan_of(zero_stage=2))["PLAN"]["fully_shard"]
    assert chosen == {
        "reshard_after_forward": False,
        "param_dtype": "bfloat16",
        "reduce_dtype": "float32",
        "offload": False,
    }
    assert mesh_module(plan_of(zero_stage=1))["PLAN"]["fully_shard"] is None


def test_batch_job():
    files = export_folder(plan_of(), "torchrun", script="my_train.py", around=["slurm"])
    assert {"#SBATCH --nodes=8", "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=1"} <= set(
        files["job.sbatch"].splitlines()
    )
    assert "--nnodes 8 --nproc-per-node 8" in files["run.sh"]
    assert "my_train.py" in files["run.sh"]


def test_nodes_of_four():
    files = export(plan_of(cluster="gb200-nvl72:4x4", batch=64), "torchrun")
    assert "--nnodes 4 --nproc-per-node 4" in files["run.sh"]


# -- other launchers' rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choices", "why"),
    [
        ("fsdp", {"pp": 2}, "no pipelines"),
        ("fsdp", {"zero_stage": 3, "optimizer_offload": "cpu"}, "offloaded together"),
        ("deepspeed", {"pp": 2, "zero_stage": 1}, "pipelines are written in Python"),
        ("deepspeed", {"cp": 2}, "Ulysses is the only"),
        ("deepspeed", {"zero_stage": 2, "parameter_offload": "cpu"}, "needs ZeRO-3"),
        ("deepspeed", {"activation_offload": "cpu"}, "cannot express activation_offload=cpu"),
    ],
)
def test_rules_of_other_launchers(name, choices, why):
    from planner.export.target import Target

    problems = Target.of(plan_of(**choices)).refused(launcher(name))
    assert why in "; ".join(map(str, problems))


def test_every_choice_a_launcher_names_exists():
    from planner.export import launchers
    from planner.technique import SLOTS, discover, off

    known = {slot: {off(slot)} for slot in SLOTS}
    for technique in discover().values():
        if technique.slot in known and technique.job == "training":
            known[technique.slot] |= set(technique.choices)
    for choices in launchers.CHOICES.values():
        for slot, values in choices.items():
            assert set(values.split()) <= known[slot], slot
    assert set(LAUNCHERS) == {
        "accelerate", "deepspeed", "fsdp", "galvatron", "megatron", "megatron-bridge", "torchtitan", "transformers",
    }  # fmt: skip
